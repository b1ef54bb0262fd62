// What bind.cpp may call. All pointers are device memory, strides count elements, `stream` is the caller's; nothing waits.
// The result is null, or what CUDA said was wrong.
#pragma once
#include <cstdint>

namespace ihvp {
namespace cuda {

constexpr int threads = 256;  // of a block

enum class Operands : int32_t { f32, bf16, f16 };

int device_count(const char** why_none);

// Rows of 16-bit numbers as a tensor map reaches them: strides count elements and are multiples of 8.
struct Rows {
    const void* data;
    int64_t slices, rows, features, stride_slice, stride_row;
};

// out += sum over items of (sum_t d[n,t,o] x[n,t,i])^2, squared, items being slices of T rows; or of a triangle, where x
// is d and items are chunks of T rows of one slice, += sum_t x x^T. `parts` (part_count,O,I) is scratch. For compute
// capability 9.0 alone.
const char* launch_sums(void* out, bool wide, float* parts, int64_t part_count, const Rows& d, const Rows& x,
                        Operands type, int64_t items, int64_t T, int64_t O, int64_t I, bool square, bool triangle,
                        void* stream);

// A layer's row of the table: V, U_A, U_G, Lambda, out; O, I'; strides of V (3), U_A, U_G, Lambda (2 each).
// Widths up to 128, all float32.
const char* launch_ekfac_solve_grouped(const int64_t* table, const float* damping, int64_t layers, int64_t Q,
                                       void* stream);

}  // namespace cuda
}  // namespace ihvp
