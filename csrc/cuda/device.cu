// Whether there is a device, and how kernels are launched and their errors named.
#include <cuda_runtime.h>

#include "launch.h"

namespace ihvp {
namespace cuda {

int device_count(const char** why_none) {
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    *why_none = error == cudaSuccess ? nullptr : cudaGetErrorString(error);
    if (error != cudaSuccess) cudaGetLastError();  // forget it
    return error == cudaSuccess ? count : 0;
}

}  // namespace cuda
}  // namespace ihvp
