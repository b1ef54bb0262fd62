// bfloat16 tokens as they are, where the processor multiplies them (AVX512-BF16, AMX): products exact, sums in float32.
// Denormals count as zero.
#pragma once
#include "engine.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace ihvp {
namespace IHVP_ISA {
namespace {

// The positions first.. as rows of the panels, here the rows k0..k1 from a column on: one by one, or by pairs.
template <class T>
struct Packed {
    static int64_t depth(int64_t positions) { return positions; }
    static void pack(const Panels<T>& out, const Rows& x, int64_t first, int64_t, int64_t k0, int64_t k1,
                     int64_t first_column = 0) {
        pack_straight(out, x, first, k0, k1, first_column);
    }
};

#ifdef __AVX512BF16__
constexpr int64_t bits_columns = 32;  // bfloat16 numbers of a register

// 32 columns of a row of bfloat16 tokens, from column c0 on; past the end, and where masked, zero.
IHVP_INLINE __m512i token_bits(const Rows& x, int64_t row, int64_t c0) {
    constexpr uint16_t one = 0x3f80;
    int64_t outer = row / x.inner, within = row - outer * x.inner;  // found once for all columns
    if (x.mask != nullptr && !x.mask[outer * x.mask_outer + within * x.mask_inner]) return _mm512_setzero_si512();
    const uint16_t* data = reinterpret_cast<const uint16_t*>(x.data) + outer * x.stride_outer +
                           within * x.stride_inner + c0 * x.stride_column;
    if (x.stride_column == 1 && c0 + bits_columns <= x.stored) return _mm512_loadu_si512(data);
    uint16_t bits[bits_columns] = {};
    for (int64_t c = 0; c < least(bits_columns, x.stored - c0); ++c) bits[c] = data[c * x.stride_column];
    if (x.features > x.stored && x.stored >= c0 && x.stored < c0 + bits_columns) bits[x.stored - c0] = one;
    return _mm512_loadu_si512(bits);
}

// The engine's product over pairs of positions: sum += even even' + odd odd'.
template <>
IHVP_INLINE void multiply_add<Pair>(Vec<float>& sum, Vec<Pair> y, Pair x) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)y, (__m512bh)_mm512_set1_epi32(int(x)));
}

// A missing last position is zero.
template <>
struct Packed<Pair> {
    static int64_t depth(int64_t positions) { return ceil_div(positions, 2); }
    static void pack(const Panels<Pair>& out, const Rows& x, int64_t first, int64_t positions, int64_t k0, int64_t k1,
                     int64_t first_column = 0) {
        constexpr int lanes = Lanes<Pair>::width;
        int64_t padded = ceil_div(out.columns, Panels<Pair>::width) * Panels<Pair>::width;
        for (int64_t k = k0; k < k1; ++k) {
            for (int64_t c = 0; c < padded; c += bits_columns) {
                int64_t row = first + 2 * k, column = first_column + c;
                __m512i even = token_bits(x, row, column);
                __m512i odd = 2 * k + 1 < positions ? token_bits(x, row + 1, column) : _mm512_setzero_si512();
                for (int half = 0; half < 2 && c + half * lanes < padded; ++half) {
                    __m512i low = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(even, 0));
                    __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(odd, 0));
                    _mm512_storeu_si512(out.at(k, c + half * lanes), _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
                    even = _mm512_shuffle_i64x2(even, even, 0xee);
                    odd = _mm512_shuffle_i64x2(odd, odd, 0xee);
                }
            }
        }
    }
};
#endif

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp
