// The launches by C names, for ctypes.
#include "launch.h"

using namespace ihvp::cuda;

extern "C" {

const char* ekfac_diagonal_update(float* out, const void* d, const void* x, int type, int64_t N, int64_t T, int64_t O,
                                  int64_t width_d, int64_t I, int64_t width_x, int64_t parts, int terms, bool squared) {
    return launch_ekfac_diagonal_update(out, d, x, Operands(type), N, T, O, width_d, I, width_x, parts, terms, squared,
                                        nullptr);
}

const char* covariance_update(double* out, const void* x, int type, int64_t rows, int64_t d, int64_t width,
                              int64_t parts, int64_t chunk, int terms) {
    return launch_covariance_update(out, x, Operands(type), rows, d, width, parts, chunk, terms, nullptr);
}

const char* gradient_dot_grouped(float* out, const int64_t* table, const unsigned char* mask, int type, int64_t layers,
                                 int64_t Q, int64_t N, int64_t T, bool bias, int terms) {
    return launch_gradient_dot_grouped(out, table, mask, Operands(type), layers, Q, N, T, bias, terms, nullptr);
}

const char* ekfac_solve_grouped(const int64_t* table, const float* damping, int64_t layers, int64_t Q) {
    return launch_ekfac_solve_grouped(table, damping, layers, Q, nullptr);
}
}
