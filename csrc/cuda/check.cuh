// Launching with more shared memory than the default, and naming what went wrong.
#pragma once
#include <cuda_runtime.h>

#include "mma.cuh"

namespace ihvp {
namespace cuda {

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
        return "the CUDA kernels were built for compute capability 8.0, 9.0 and newer than 9.0; this device is none of them";
    return cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace ihvp
