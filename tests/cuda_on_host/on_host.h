// The names of CUDA and of instructions.cuh for the host: a block's threads are fibers that take turns, and what a warp
// does together waits for all of its threads. Fragments lie as the PTX manual draws them.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "launch.h"

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define IHVP_SHARED_MEMORY(name) unsigned char* name = ihvp::cuda::host.shared

using std::min;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx;

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

namespace ihvp {
namespace cuda {

struct Barrier {
    int size, arrived = 0, generation = 0;
};

struct Host {
    alignas(16) unsigned char shared[1 << 18];
    ucontext_t scheduler, fibers[threads];
    std::vector<char> stacks[threads];
    bool done[threads];
    int current;
    std::function<void()> body;
    Barrier block, warp[threads / 32];
    uint32_t registers[threads / 32][32][8];  // what the threads of a warp show each other
};
inline Host host;

inline void turn() { swapcontext(&host.fibers[host.current], &host.scheduler); }

inline void wait(Barrier& barrier) {
    int own = barrier.generation;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    while (barrier.generation == own) turn();
}

inline void fiber() {
    host.body();
    host.done[host.current] = true;
    turn();
}

inline void run_block() {
    host.block = {threads};
    for (Barrier& warp : host.warp) warp = {32};
    std::memset(host.shared, 0x7f, sizeof host.shared);  // nothing may count on zeros there
    for (int t = 0; t < threads; ++t) {
        host.done[t] = false;
        host.stacks[t].resize(1 << 16);
        getcontext(&host.fibers[t]);
        host.fibers[t].uc_stack.ss_sp = host.stacks[t].data();
        host.fibers[t].uc_stack.ss_size = host.stacks[t].size();
        makecontext(&host.fibers[t], fiber, 0);
    }
    for (int left = threads; left > 0;)
        for (int t = 0; t < threads; ++t) {
            if (host.done[t]) continue;
            host.current = t;
            threadIdx = dim3(unsigned(t), 0, 0);
            swapcontext(&host.scheduler, &host.fibers[t]);
            left -= host.done[t];
        }
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, size_t shared_bytes, void*, Arguments... arguments) {
    if (shared_bytes > sizeof host.shared) return "too much shared memory";
    host.body = [=] { kernel(arguments...); };
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                run_block();
            }
    return nullptr;
}

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// Ten bits of mantissa, ties away from zero.
inline uint32_t tf32(float x) { return (as_bits(x) + 0x1000u) & ~0x1fffu; }

inline uint32_t (&shown())[32][8] { return host.registers[host.current / 32]; }

template <int depth, class Element>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Element& element) {
    int lane = host.current % 32;
    Barrier& warp = host.warp[host.current / 32];
    auto& all = shown();
    std::copy(a, a + 4, all[lane]);
    all[lane][4] = b0;
    all[lane][5] = b1;
    wait(warp);
    constexpr int half = depth / 2, per_register = depth / 8;  // k's halves lie in different registers
    for (int i = 0; i < 4; ++i) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < depth; ++k) {
            int member = k % half / per_register, part = k % per_register;
            float x = element(all[row % 8 * 4 + member][row / 8 + 2 * (k / half)], part);
            sum += x * element(all[column * 4 + member][4 + k / half], part);
        }
        c[i] += sum;
    }
    wait(warp);
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma<8>(c, a, b[0], b[1], [](uint32_t x, int) { return as_float(x); });
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma<16>(c, a, b0, b1, [](uint32_t x, int part) { return as_float(part ? x & 0xffff0000u : x << 16); });
}

inline void load_transposed(uint32_t (&r)[4], const __nv_bfloat16* at) {
    int lane = host.current % 32;
    Barrier& warp = host.warp[host.current / 32];
    auto& all = shown();
    std::memcpy(all[lane], at, 16);  // a row of one of the four matrices
    wait(warp);
    auto element = [&](int matrix, int row, int column) {
        return uint32_t(reinterpret_cast<const uint16_t*>(all[matrix * 8 + row])[column]);
    };
    for (int matrix = 0; matrix < 4; ++matrix)
        r[matrix] = element(matrix, lane % 4 * 2, lane / 4) | element(matrix, lane % 4 * 2 + 1, lane / 4) << 16;
    wait(warp);
}

inline void copy_async(void* to, const void* from, bool inside) {
    if (inside)
        std::memcpy(to, from, 16);
    else
        std::memset(to, 0, 16);
}
inline void commit_copies() {}
template <int>
void wait_for_copies() {}

}  // namespace cuda
}  // namespace ihvp

inline void __syncthreads() { ihvp::cuda::wait(ihvp::cuda::host.block); }
inline void __syncwarp() { ihvp::cuda::wait(ihvp::cuda::host.warp[ihvp::cuda::host.current / 32]); }
inline float __uint_as_float(uint32_t bits) { return ihvp::cuda::as_float(bits); }
inline float __bfloat162float(__nv_bfloat16 x) { return ihvp::cuda::as_float(uint32_t(x.bits) << 16); }
inline float __half2float(__half x) {
    _Float16 y;
    std::memcpy(&y, &x.bits, 2);
    return float(y);
}
inline float __shfl_xor_sync(unsigned, float x, int across) {
    int lane = ihvp::cuda::host.current % 32;
    auto& all = ihvp::cuda::shown();
    all[lane][0] = ihvp::cuda::as_bits(x);
    __syncwarp();
    float other = ihvp::cuda::as_float(all[lane ^ across][0]);
    __syncwarp();
    return other;
}
