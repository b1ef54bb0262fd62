// The launches by C names, for ctypes.
#include "launch.h"

using namespace ihvp::cuda;

extern "C" {

const char* ekfac_solve_grouped(const int64_t* table, const float* damping, int64_t layers, int64_t Q) {
    return launch_ekfac_solve_grouped(table, damping, layers, Q, nullptr);
}
}
