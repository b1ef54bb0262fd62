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

// Null, or what CUDA said was wrong; a launch that failed leaves nothing behind.
inline const char* described(cudaError_t error) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    if (error == cudaErrorNoKernelImageForDevice)
        return "the CUDA kernels were built for compute capability 8.0 to 8.9, 9.0 and newer; this device is older";
    return cudaGetErrorString(error);
}

// With more shared memory than the default.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, size_t shared_bytes, void* stream,
                   Arguments... arguments) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error == cudaSuccess) {
        kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
        error = cudaGetLastError();
    }
    return described(error);
}

}  // namespace cuda
}  // namespace ihvp
