// Float32 products as products of pairs of 16-bit integers (AVX512-VNNI), which are twice as fast.
// In blocks of at most 128 k, a column v of an operand is read in units of about 2^-15.5 of its norm in the block,
// q = round(v / unit), so that by Cauchy and Schwarz no sum of q_v q_w leaves 32 bits:
//     sum_k v w ~ sum over blocks unit_v unit_w (sum_k q_v q_w)      error about 1e-5 |v| |w|
// Where a number is not finite, or a column of a block next to nothing, it cannot be read so.
#pragma once
#include "engine.h"
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace ihvp {
namespace IHVP_ISA {
namespace {

// Whether all that the threads read could be read.
class Readable {
  public:
    void note(bool readable) {
        if (!readable) __atomic_store_n(&all_, 0, __ATOMIC_RELAXED);
    }
    explicit operator bool() const { return all_ != 0; }

  private:
    int all_ = 1;
};

#ifdef __AVX512VNNI__
using Words = int32_t;  // two 16-bit integers, the first one below

// The engine's product over pairs of k.
template <>
IHVP_INLINE void multiply_add<Words>(Vec<Words>& sum, Vec<Words> y, Words x) {
    sum = (Vec<Words>)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)y, _mm512_set1_epi32(x));
}

constexpr int64_t block_pairs = 64;                     // of k, summed in 32 bits
constexpr float most_norm = 46200, most_entry = 32700;  // in units: squared, and rounded up, below 2^31 and 2^15
constexpr int64_t fixed_width = Panels<float>::width, fixed_vectors = fixed_width / 16;
static_assert(fixed_width == Panels<Words>::width, "a panel of floats becomes one of words");

// k in blocks of as many pairs each.
struct Blocks {
    int64_t k, pairs, count, each;
    explicit Blocks(int64_t k)
        : k(k), pairs(ceil_div(k, 2)), count(most(1, ceil_div(pairs, block_pairs))), each(ceil_div(pairs, count)) {}
    int64_t depth(int64_t b) const { return least(each, pairs - b * each); }
    int64_t begin(int64_t b) const { return 2 * b * each; }
    int64_t end(int64_t b) const { return least(k, begin(b + 1)); }
};

// The units in which a block of a panel's columns fits, by its norms and its largest entries; 0 for zeros alone.
// row(k, v): a vector of row k. False where an entry is not finite, or all are next to nothing.
template <class Row>
IHVP_INLINE bool find_units(float* unit, int64_t k0, int64_t k1, const Row& row) {
    __m512 largest[fixed_vectors] = {}, squares[fixed_vectors] = {};
    for (int64_t k = k0; k < k1; ++k) {
        for (int v = 0; v < fixed_vectors; ++v) {
            __m512 x = row(k, v);
            largest[v] = _mm512_max_ps(largest[v], _mm512_abs_ps(x));
            squares[v] = _mm512_fmadd_ps(x, x, squares[v]);
        }
    }
    auto between = [](__m512 x, float low, float high) {
        return __mmask16(_mm512_cmp_ps_mask(x, _mm512_set1_ps(low), _CMP_GT_OQ) &
                         _mm512_cmp_ps_mask(x, _mm512_set1_ps(high), _CMP_LT_OQ));
    };
    bool readable = true;
    for (int v = 0; v < fixed_vectors; ++v) {
        constexpr float least_square = 1e-30f, most_square = 1e30f, root = 11.4f;
        static_assert(root * root > 2 * block_pairs, "no norm is more than that many times the largest entry");
        __m512 norm = _mm512_mask_sqrt_ps(largest[v] * _mm512_set1_ps(root),
                                          between(squares[v], least_square, most_square), squares[v]);
        __m512 by_norm = norm * _mm512_set1_ps(1 / most_norm), by_entry = largest[v] * _mm512_set1_ps(1 / most_entry);
        _mm512_storeu_ps(unit + v * 16, _mm512_max_ps(by_norm, by_entry));
        __mmask16 number = _mm512_cmp_ps_mask(squares[v], squares[v], _CMP_ORD_Q);  // max drops a NaN, a sum does not
        __mmask16 zero = _mm512_cmp_ps_mask(largest[v], _mm512_setzero_ps(), _CMP_EQ_OQ);
        readable = readable && (number & (zero | between(largest[v], 1e-30f, 1e30f))) == 0xffff;
    }
    return readable;
}

// Rows 2 pair and 2 pair + 1 of a panel's products with 1 / unit, rounded; the second is zero past the end.
template <class Row>
IHVP_INLINE void quantise(Words* out, int64_t k0, int64_t k1, const float* unit, const Row& row) {
    __m512 scale[fixed_vectors];
    for (int v = 0; v < fixed_vectors; ++v) {
        __m512 own = _mm512_loadu_ps(unit + v * 16);
        scale[v] =
            _mm512_maskz_div_ps(_mm512_cmp_ps_mask(own, _mm512_setzero_ps(), _CMP_GT_OQ), _mm512_set1_ps(1), own);
    }
    for (int64_t k = k0; k < k1; k += 2, out += fixed_width) {
        for (int v = 0; v < fixed_vectors; ++v) {
            __m512i even = _mm512_cvtps_epi32(row(k, v) * scale[v]);
            __m512i odd = k + 1 < k1 ? _mm512_cvtps_epi32(row(k + 1, v) * scale[v]) : _mm512_setzero_si512();
            _mm512_storeu_si512(out + v * 16, _mm512_mask_blend_epi16(0xaaaaaaaau, even, _mm512_slli_epi32(odd, 16)));
        }
    }
}

// An operand in fixed point. Its k are the positions of `groups` sums, one after the other, each in the same blocks.
struct FixedPanels {
    Blocks blocks;
    Panels<Words> words;
    float* units;  // of each column of each block

    // Words, then units, in one piece of memory of so many numbers.
    static int64_t size(int64_t groups, int64_t positions, int64_t columns) {
        Blocks blocks(positions);
        return groups * (blocks.pairs + blocks.count) * ceil_div(columns, fixed_width) * fixed_width;
    }
    FixedPanels(float* memory, int64_t groups, int64_t positions, int64_t columns)
        : blocks(positions),
          words{reinterpret_cast<Words*>(memory), groups * blocks.pairs, columns},
          units(memory + Panels<Words>::size(words.depth, columns)) {}

    int64_t row(int64_t group, int64_t b) const { return group * blocks.pairs + b * blocks.each; }
    float* unit(int64_t group, int64_t b, int64_t column) const {
        return units + (group * blocks.count + b) * words.count() * fixed_width + column;
    }

    // Panel p of a block from its rows as they are packed. False where it cannot be read.
    bool fill(int64_t group, int64_t b, int64_t p, const float* rows) const {
        auto row_of = [&](int64_t k, int v) { return _mm512_loadu_ps(rows + k * fixed_width + v * 16); };
        int64_t count = blocks.end(b) - blocks.begin(b);
        float* own = unit(group, b, p * fixed_width);
        bool readable = find_units(own, 0, count, row_of);
        quantise(words.at(row(group, b), p * fixed_width), 0, count, own, row_of);
        return readable;
    }
};

// A block's tile, in its units, added to a sum.
struct IntoScaled {
    Tile<float>& sum;
    const float *rows, *columns;
    static constexpr bool more = false;

    IHVP_INLINE Vec<Words> first(int, int) const { return Vec<Words>{}; }
    IHVP_INLINE void last(int r, int v, Vec<Words> x) const {
        sum.acc[r][v] += (Vec<float>)_mm512_cvtepi32_ps((__m512i)x) * rows[r] * load(columns + v * 16);
    }
};

// The same, where the tile ends in memory; with `added` it is added to what is there.
struct IntoScaledRows {
    float* data;
    int64_t stride;
    const float *rows, *columns;
    bool added;
    static constexpr bool more = false;

    IHVP_INLINE Vec<Words> first(int, int) const { return Vec<Words>{}; }
    IHVP_INLINE void last(int r, int v, Vec<Words> x) const {
        float* at = data + r * stride + v * 16;
        Vec<float> value = (Vec<float>)_mm512_cvtepi32_ps((__m512i)x) * rows[r] * load(columns + v * 16);
        store(at, added ? load(at) + value : value);
    }
};

// The product of a group, added to a tile; `ahead` and `first` as for multiply.
IHVP_INLINE void add_product(Tile<float>& sum, const FixedPanels& x, int64_t i, const FixedPanels& y, int64_t p,
                             int64_t group, Ahead ahead = {}, int64_t first = 0) {
    for (int64_t b = 0; b < y.blocks.count; ++b) {
        int64_t k = y.row(group, b), depth = y.blocks.depth(b);
        IntoScaled target{sum, x.unit(group, b, i), y.unit(group, b, p * fixed_width + first * 16)};
        sum.vectors = multiply<Words>(target, x.words, i, y.words, p, k, k + depth, ahead, first);
        if (ahead.data != nullptr) ahead.data += depth * ahead.stride;
    }
}
#endif

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp
