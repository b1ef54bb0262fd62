// Hopper's own instructions: tiles fetched by tensor maps, barriers that count their bytes, and products of warpgroups
// whose operands stay in shared memory. Compiled for sm_90a alone.
#pragma once
#include <cuda.h>

#include "instructions.cuh"

namespace ihvp {
namespace cuda {
namespace hopper {

constexpr int box = 64;  // features a row of a fetched box: 128 bytes, which the swizzle permutes by rows of eight
constexpr int box_rows = 64;
constexpr int box_bytes = box * box_rows * 2;

__device__ inline uint32_t address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

__device__ inline void init_barrier(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals));
}

__device__ inline void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void expect_bytes(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ inline void arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ inline void wait(uint64_t* barrier, uint32_t phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}\n" ::"r"(address(barrier)),
        "r"(phase)
        : "memory");
}

// The box at (feature, row, slice) of a tensor; what lies outside is zero.
__device__ inline void fetch(void* to, const CUtensorMap* map, uint64_t* barrier, int feature, int row, int slice) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
            address(to)),
        "l"(map), "r"(address(barrier)), "r"(feature), "r"(row), "r"(slice)
        : "memory");
}

// A descriptor of boxes one after the other, features (the product's rows or columns) side by side.
__device__ inline uint64_t describe(const void* boxes) {
    constexpr uint64_t swizzle_128 = uint64_t(1) << 62;
    constexpr uint64_t next_box = uint64_t(box_bytes >> 4) << 16, next_eight_rows = uint64_t(8 * box * 2 >> 4) << 32;
    return swizzle_128 | next_eight_rows | next_box | uint64_t((address(boxes) & 0x3ffff) >> 4);
}

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int pending>
__device__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// c (64x128) = or += sum over 16 rows of a^T b. Row 16 w + l / 4 + 8 h, column 8 j + 2 (l % 4) + e of the product are
// c[4 j + 2 h + e] of lane l of warp w.
#define IHVP_C8(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
                   "+f"(c[i + 6]), "+f"(c[i + 7])
#define IHVP_PRODUCT(type)                                                                                        \
    asm volatile(                                                                                                 \
        "{\n"                                                                                                     \
        ".reg .pred more;\n"                                                                                      \
        "setp.ne.b32 more, %66, 0;\n"                                                                             \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                              \
        " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"    \
        "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,"    \
        "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, more, 1, 1, 1, 1;\n"                         \
        "}\n"                                                                                                     \
        : IHVP_C8(0), IHVP_C8(8), IHVP_C8(16), IHVP_C8(24), IHVP_C8(32), IHVP_C8(40), IHVP_C8(48), IHVP_C8(56)    \
        : "l"(a), "l"(b), "r"(int(add)))

template <bool bf16>
__device__ void product(float (&c)[64], uint64_t a, uint64_t b, bool add) {
    if (bf16)
        IHVP_PRODUCT("bf16");
    else
        IHVP_PRODUCT("f16");
}

#undef IHVP_PRODUCT
#undef IHVP_C8

}  // namespace hopper
}  // namespace cuda
}  // namespace ihvp
