// All that the kernels take from CUDA: its headers, the instructions that no C++ names, and launching. A test gives the
// same names to the host (tests/cuda_on_host), and runs the kernels without a GPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "launch.h"

#define IHVP_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

namespace ihvp {
namespace cuda {

__device__ inline uint32_t tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

__device__ inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 16-bit numbers, transposed on the way: k along the rows becomes k along a register.
__device__ inline void load_transposed(uint32_t (&r)[4], const __nv_bfloat16* at) {
    uint32_t address = uint32_t(__cvta_generic_to_shared(at));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

// 16 bytes into shared memory, zeros unless `inside`.
__device__ inline void copy_async(void* to, const void* from, bool inside) {
    uint32_t address = uint32_t(__cvta_generic_to_shared(to));
    int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes));
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Until all but the last `pending` groups of copies have come.
template <int pending>
__device__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending));
}

// With more shared memory than the default; null, or what CUDA said was wrong.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, size_t shared_bytes, void* stream,
                   Arguments... arguments) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error == cudaSuccess) {
        kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
        error = cudaGetLastError();
    }
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // a launch that failed leaves nothing behind
    if (error == cudaErrorNoKernelImageForDevice)
        return "the CUDA kernels were built for compute capability 8.0 to 8.9, 9.0 and newer; this device is older";
    return cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace ihvp
