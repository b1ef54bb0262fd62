// S[m,n] = sum_o y1[m,o] y2[n,o] (sum_i x1[m,i] x2[n,i] weight[i,o]) for float32, in 16-bit fixed point on dot products
// of pairs (AVX512-VNNI), which are twice as fast as float32 multiply-adds.
// In blocks of at most 128 i, a row of products v = x1[m] x2[n] and a column of the weight w are read in units of about
// 2^-15.5 of their norm in the block, q = round(v / unit), so that by Cauchy and Schwarz no sum of q_v q_w leaves 32
// bits:
//     sum_i v w ~ sum over blocks unit_v unit_w (sum_i q_v q_w)      relative error, of norms, about 1e-4
// Where a number is not finite, or a block is next to nothing, nothing is computed here, but all in float32.
#include "engine.h"
#include <immintrin.h>

namespace ihvp {

namespace avx512 {
Status weighted_ghost_dot(View, View, View, View, View, View, View, View, bool, Precision, int);
}

namespace IHVP_ISA {

namespace {

using Words = int32_t;  // two 16-bit integers, the first one below

// The engine's product over pairs of k.
template <>
IHVP_INLINE void multiply_add<Words>(Vec<Words>& sum, Vec<Words> y, Words x) {
    sum = (Vec<Words>)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)y, _mm512_set1_epi32(x));
}

constexpr int64_t chunk_examples = 2048;
constexpr int64_t together = 4;                         // rows m that share a block of the weight in the L2 cache
constexpr int64_t block_pairs = 64;                     // of k, summed in 32 bits
constexpr float most_norm = 46200, most_entry = 32700;  // in units: squared, and rounded up, below 2^31 and 2^15
constexpr int64_t width = Panels<float>::width, vectors = width / 16;
static_assert(width == Panels<Words>::width, "a panel of floats becomes one of words");

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
    __m512 largest[vectors] = {}, squares[vectors] = {};
    for (int64_t k = k0; k < k1; ++k) {
        for (int v = 0; v < vectors; ++v) {
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
    for (int v = 0; v < vectors; ++v) {
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
    __m512 scale[vectors];
    for (int v = 0; v < vectors; ++v) {
        __m512 own = _mm512_loadu_ps(unit + v * 16);
        scale[v] =
            _mm512_maskz_div_ps(_mm512_cmp_ps_mask(own, _mm512_setzero_ps(), _CMP_GT_OQ), _mm512_set1_ps(1), own);
    }
    for (int64_t k = k0; k < k1; k += 2, out += width) {
        for (int v = 0; v < vectors; ++v) {
            __m512i even = _mm512_cvtps_epi32(row(k, v) * scale[v]);
            __m512i odd = k + 1 < k1 ? _mm512_cvtps_epi32(row(k + 1, v) * scale[v]) : _mm512_setzero_si512();
            _mm512_storeu_si512(out + v * 16, _mm512_mask_blend_epi16(0xaaaaaaaau, even, _mm512_slli_epi32(odd, 16)));
        }
    }
}

// `done` is set when the result is there.
Status run(const View& out, const Rows& x1, const Rows& y1, const Rows& x2, const Rows& y2, const Rows& weight,
           bool rows_are_columns, int threads, bool& done) {
    int64_t M = x1.count, N = x2.count, I = x1.features, O = y1.features;
    int64_t chunk = least(N, chunk_examples), panels = ceil_div(O, width), padded = panels * width;
    Blocks blocks(I);
    int64_t size_x = most(Panels<float>::size(I, O), Panels<float>::size(I, chunk));
    int64_t own_floats = together * (I + padded) + padded, own_words = blocks.each * width;
    Workspace space;
    space.plan<Words>(blocks.pairs * padded);
    space.plan<float>(blocks.count * padded);
    space.plan<float>(size_x);
    space.plan<float>(Panels<float>::size(chunk, O));
    space.plan<float>(threads * own_floats);
    space.plan<Words>(threads * own_words);
    space.plan<bool>(threads);
    if (!space.allocate()) return Status::out_of_memory;
    Words* memory_w = space.take<Words>(blocks.pairs * padded);
    float* unit_w = space.take<float>(blocks.count * padded);
    float* memory_x = space.take<float>(size_x);  // first the weight's
    float* memory_y = space.take<float>(Panels<float>::size(chunk, O));
    float* scratch = space.take<float>(threads * own_floats);
    Words* products = space.take<Words>(threads * own_words);
    bool* unreadable = space.take<bool>(threads);
    float* result = static_cast<float*>(out.data);
    for (int t = 0; t < threads; ++t) unreadable[t] = false;
    auto all_readable = [&] {
        for (int t = 0; t < threads; ++t) {
            if (unreadable[t]) return false;
        }
        return true;
    };
    auto w = [&](int64_t b) { return Panels<Words>{memory_w + b * blocks.each * padded, blocks.depth(b), O}; };

    Panels<float> plain{memory_x, I, O};
    if (rows_are_columns) {
        pack_transposed(plain, weight, 0, threads);
    } else {
        pack_straight(plain, weight, 0, threads);
    }
    parallel(threads, panels, [&](int64_t p, int thread) {
        const float* in = plain.at(0, p * width);
        auto row = [&](int64_t k, int v) { return _mm512_loadu_ps(in + k * width + v * 16); };
        for (int64_t b = 0; b < blocks.count; ++b) {
            float* unit = unit_w + b * padded + p * width;
            unreadable[thread] |= !find_units(unit, blocks.begin(b), blocks.end(b), row);
            quantise(w(b).at(0, p * width), blocks.begin(b), blocks.end(b), unit, row);
        }
    });
    if (!all_readable()) return Status::ok;

    for (int64_t first = 0; first < N; first += chunk) {
        int64_t count = least(chunk, N - first);
        Panels<float> x{memory_x, I, count}, y{memory_y, count, O};
        pack_transposed(x, x2, first, threads);
        pack_straight(y, y2, first, threads);
        parallel(threads, ceil_div(M, together) * x.count(), [&](int64_t task, int thread) {
            int64_t m0 = task / x.count() * together, some = least(together, M - m0);
            int64_t p = task % x.count(), columns = least(width, count - p * width);
            float* rows_x = scratch + thread * own_floats;
            float* rows_y = rows_x + together * I;
            float* scaled_y = rows_y + together * padded;
            Words* own = products + thread * own_words;
            for (int64_t m = 0; m < some; ++m) {
                x1.read(rows_x + m * I, m0 + m, 0, I);
                y1.read(rows_y + m * padded, m0 + m, 0, O);
                for (int64_t c = O; c < padded; ++c) rows_y[m * padded + c] = 0;
            }
            const float* in = x.at(0, p * width);
            Vec<float> totals[together][width] = {};
            for (int64_t step = 0; step < blocks.count * some; ++step) {
                int64_t b = step / some, m = step % some;
                const float* row_x = rows_x + m * I;
                auto row = [&](int64_t k, int v) {
                    return _mm512_loadu_ps(in + k * width + v * 16) * _mm512_set1_ps(row_x[k]);
                };
                float unit[width];
                unreadable[thread] |= !find_units(unit, blocks.begin(b), blocks.end(b), row);
                quantise(own, blocks.begin(b), blocks.end(b), unit, row);
                for (int64_t c = 0; c < padded; ++c) scaled_y[c] = rows_y[m * padded + c] * unit_w[b * padded + c];
                Panels<Words> left{own, blocks.depth(b), columns};
                product(left, 0, columns, w(b), 0, panels, [&](const Tile<Words>& tile, int64_t i, int64_t j) {
                    for (int r = 0; r < tile_rows && i + r < columns; ++r) {
                        Vec<float> sum = {};
                        for (int v = 0; v < tile.vectors; ++v) {
                            Vec<float> both = load(scaled_y + j + v * 16) * load(y.at(p * width + i + r, j) + v * 16);
                            sum += _mm512_cvtepi32_ps((__m512i)tile.acc[r][v]) * both;
                        }
                        totals[m][i + r] += sum * unit[i + r];
                    }
                });
            }
            for (int64_t m = 0; m < some; ++m) {
                float* to = result + (m0 + m) * out.stride[0];
                for (int64_t c = 0; c < columns; ++c)
                    to[(first + p * width + c) * out.stride[1]] = sum_lanes<float>(totals[m][c]);
            }
        });
        if (!all_readable()) return Status::ok;
    }
    done = true;
    return Status::ok;
}

}  // namespace

Status weighted_ghost_dot(View out, View a1, View delta1, View a2, View delta2, View weight, View mask1, View mask2,
                          bool bias, Precision precision, int threads) {
    if (out.dtype == DType::f32 && precision == Precision::int16) {
        Rows x1 = token_rows(a1, mask1, bias), x2 = token_rows(a2, mask2, bias);
        Rows y1 = token_rows(delta1, mask1, false), y2 = token_rows(delta2, mask2, false), w = matrix_rows(weight);
        bool done = false, swap = y1.features > x1.features;  // contract over the longer side
        Status status =
            swap ? run(out, y1, x1, y2, x2, w, false, threads, done) : run(out, x1, y1, x2, y2, w, true, threads, done);
        if (done || status != Status::ok) return status;
    }
    return avx512::weighted_ghost_dot(out, a1, delta1, a2, delta2, weight, mask1, mask2, bias, precision, threads);
}

}  // namespace IHVP_ISA
}  // namespace ihvp
