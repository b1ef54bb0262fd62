// What bind.cpp may call. All pointers are device memory, strides count elements, `stream` is the caller's; nothing waits.
// The result is null, or what CUDA said was wrong.
#pragma once
#include <cstdint>

namespace ihvp {
namespace cuda {

constexpr int threads = 256;  // of a block

enum class Operands : int32_t { f32, bf16, f16 };

int device_count(const char** why_none);

// out[part] = sum over the part's examples of (sum_t d[n,t,o] x[n,t,i])^2; `squared`: T = 1, of d^2 x^2.
const char* launch_ekfac_diagonal_update(float* out, const void* d, const void* x, Operands type, int64_t N, int64_t T,
                                         int64_t O, int64_t width_d, int64_t I, int64_t width_x, int64_t parts,
                                         int terms, bool squared, void* stream);

// out[part], the tiles on and above the diagonal: += sum over the part's rows of x x^T, in float32 over `chunk` rows.
const char* launch_covariance_update(double* out, const void* x, Operands type, int64_t rows, int64_t d, int64_t width,
                                     int64_t parts, int64_t chunk, int terms, void* stream);

// A plane of 16-bit numbers as a tensor map reaches it: strides are multiples of 8 elements.
struct Plane {
    const void* data;
    int64_t slices, rows, features, stride_slice, stride_row;
};

// out += sum over items of sum_t d x^T, or of its square; of a triangle x is d. `parts` (part_count,O,I) is scratch; with
// two planes a number is their sum, times a scale for each item where squared, else for all.
const char* launch_sums_hopper(void* out, bool wide, float* parts, int64_t part_count, const Plane* d, const Plane* x,
                               int planes, Operands type, const float* scale_d, const float* scale_x, int64_t items,
                               int64_t T, int64_t O, int64_t I, bool square, bool triangle, void* stream);

// out[layer,q,n] = <P_layer[q], g_layer[n]>. A layer's row of the table: P, contiguous float32, a, delta; O, I';
// three strides of each.
const char* launch_gradient_dot_grouped(float* out, const int64_t* table, const unsigned char* mask, Operands type,
                                        int64_t layers, int64_t Q, int64_t N, int64_t T, bool bias, int terms,
                                        void* stream);

// A layer's row of the table: V, U_A, U_G, Lambda, out; O, I'; strides of V (3), U_A, U_G, Lambda (2 each).
// Widths up to 128, all float32.
const char* launch_ekfac_solve_grouped(const int64_t* table, const float* damping, int64_t layers, int64_t Q,
                                       void* stream);

}  // namespace cuda
}  // namespace ihvp
