// weighted_ghost_dot in fixed point, on int8 tile products (AMX): twice the speed of bfloat16 ones.
// A row of products v = x1[m] x2[n] and a column of the weight w are read in units of 2^-15 or so of their largest
// entry, q = round(v / unit) = 256 hi + lo with hi and lo of eight bits, and
//     int8x3: v w ~ unit_v unit_w (65536 hi_v hi_w + 256 (hi_v lo_w + lo_v hi_w))
// with exact sums over up to 576 k. What is left out, lo_v lo_w, is some 5e-6 of the result times the ratio of the
// largest entry to the root mean square, in v and in w; where that may pass `tolerance`, or a number is not finite,
// nothing is computed.
#pragma once
#include "amx.h"

namespace ihvp {
namespace IHVP_ISA {
namespace {

constexpr int64_t deep_step = 64;               // k of one int8 tile product
constexpr int64_t tile_bytes = 1024;            // int8 numbers of a tile
constexpr int64_t deep_bytes = 4 * tile_bytes;  // of one operand's step: hi of 32 rows or columns, then lo
constexpr int64_t deep_block = 9;               // steps that stay in the L1 cache with their products
constexpr int64_t deep_sums = 2048;             // of 32 x 32: hi hi, then the cross terms
constexpr int64_t near_bytes = 3 << 19;         // of the weight, where it leaves room in an L2 cache of 2 MB
constexpr float units = 32512;                  // of the largest entry: 127 * 256
constexpr double left_out = 5.1e-6, tolerance = 2e-4;

// A row of a matrix, with zeros up to `padded`.
void read_padded(float* out, const Rows& rows, int64_t row, int64_t padded) {
    rows.read(out, row, 0, rows.features);
    for (int64_t c = rows.features; c < padded; ++c) out[c] = 0;
}

// 32 x 32 entries of a matrix, or of its transpose, from (k0, c0) on; zeros past its end.
void read_square(float* out, const Rows& matrix, bool transposed, int64_t k0, int64_t c0) {
    int64_t K = transposed ? matrix.features : matrix.count, C = transposed ? matrix.count : matrix.features;
    int64_t depth = least(32, K - k0), columns = least(32, C - c0);
    for (int64_t e = 0; e < 32 * 32; ++e) out[e] = 0;
    if (transposed) {
        for (int64_t c = 0; c < columns && depth > 0; ++c) {
            float row[32];
            matrix.read(row, c0 + c, k0, k0 + depth);
            for (int64_t k = 0; k < depth; ++k) out[k * 32 + c] = row[k];
        }
    } else {
        for (int64_t k = 0; k < depth; ++k) matrix.read(out + k * 32, k0 + k, c0, c0 + columns);
    }
}

// The largest magnitude and the squares' sum, of a row's products or of a column. Sums of squares that are not finite
// tell that an entry is not, or too large.
struct Extent {
    float largest = 0, squares = 0;
    bool readable() const { return squares < 1e30f && (largest == 0 || largest > 1e-30f); }
};

IHVP_INLINE Extent extent_of_products(const float* row1, const float* row2, int64_t padded) {
    __m512 largest[2] = {}, squares[2] = {};
    for (int64_t k = 0; k < padded; k += 32) {
        for (int half = 0; half < 2; ++half) {
            int64_t at = k + half * 16;
            __m512 v = _mm512_loadu_ps(row1 + at) * _mm512_loadu_ps(row2 + at);
            largest[half] = _mm512_max_ps(largest[half], _mm512_abs_ps(v));
            squares[half] = _mm512_fmadd_ps(v, v, squares[half]);
        }
    }
    return {_mm512_reduce_max_ps(_mm512_max_ps(largest[0], largest[1])), sum_lanes<float>(squares[0] + squares[1])};
}

IHVP_INLINE float inverse(float unit) { return unit > 0 ? 1 / unit : 0; }

// hi of 16 integers, so that what is left of them fits into eight bits with a sign.
IHVP_INLINE __m512i high_bytes(__m512i q) { return _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8); }

// A step of 64 of a row's products as one row of the hi and of the lo tile. Packing interleaves: byte 16 l + 4 j + t
// of a tile's row is k = 16 j + 4 l + t.
IHVP_INLINE void pack_deep_row(int8_t* tiles, const float* row1, const float* row2, float scale) {
    __m512i q[4];
    for (int j = 0; j < 4; ++j) {
        __m512 v = _mm512_loadu_ps(row1 + j * 16) * _mm512_loadu_ps(row2 + j * 16);
        q[j] = _mm512_cvtps_epi32(v * _mm512_set1_ps(scale));
    }
    __m512i even = _mm512_packs_epi32(q[0], q[1]), odd = _mm512_packs_epi32(q[2], q[3]);
    __m512i half = _mm512_set1_epi16(128), low = _mm512_set1_epi16(255);
    __m512i hi = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(even, half), 8),
                                    _mm512_srai_epi16(_mm512_add_epi16(odd, half), 8));
    __m512i lo = _mm512_packus_epi16(_mm512_and_si512(even, low), _mm512_and_si512(odd, low));
    _mm512_storeu_si512(tiles, hi);
    _mm512_storeu_si512(tiles + 2 * tile_bytes, lo);
}

// A block of 32 columns of the weight, read into `rows` (K x 32, zeroed beyond), as tiles whose row r holds four k of
// each of 16 columns: those of the bytes 4 r.. above.
void pack_deep_weight(int8_t* tiles, const float* rows, const float* unit, int64_t steps) {
    for (int64_t s = 0; s < steps; ++s, rows += deep_step * 32, tiles += deep_bytes) {
        for (int64_t half = 0; half < 2; ++half) {
            float scales[16];
            for (int c = 0; c < 16; ++c) scales[c] = inverse(unit[half * 16 + c]);
            __m512 scale = _mm512_loadu_ps(scales);
            for (int64_t r = 0; r < 16; ++r) {
                int64_t k = r % 4 * 16 + r / 4 * 4;
                __m512i hi = _mm512_setzero_si512(), lo = hi, byte = _mm512_set1_epi32(255);
                for (int t = 3; t >= 0; --t) {
                    __m512i q = _mm512_cvtps_epi32(_mm512_loadu_ps(rows + (k + t) * 32 + half * 16) * scale);
                    hi = _mm512_or_si512(_mm512_slli_epi32(hi, 8), _mm512_and_si512(high_bytes(q), byte));
                    lo = _mm512_or_si512(_mm512_slli_epi32(lo, 8), _mm512_and_si512(q, byte));
                }
                _mm512_storeu_si512(tiles + half * tile_bytes + r * 64, hi);
                _mm512_storeu_si512(tiles + (2 + half) * tile_bytes + r * 64, lo);
            }
        }
    }
}

// The row dots of finished sums with y1[m] y2[n], a row at a time, added to vectors of `totals`.
struct DeepDots {
    const int32_t* sums;
    const float *row_y, *rows_y;  // the block's columns of y1[m] and of rows of y2, `stride` apart
    int64_t stride, last;         // the last row stands for those that are not there
    float* totals;

    IHVP_INLINE void add(int64_t r) const {
        const int32_t* at = sums + r / 16 * 512 + r % 16 * 16;
        const float* own_y = rows_y + least(r, last) * stride;
        __m512 total = _mm512_loadu_ps(totals + r * 16);
        for (int half = 0; half < 2; ++half) {
            __m512 high = _mm512_cvtepi32_ps(_mm512_loadu_si512(at + half * 256));
            __m512 cross = _mm512_cvtepi32_ps(_mm512_loadu_si512(at + 1024 + half * 256));
            __m512 y = _mm512_loadu_ps(row_y + half * 16) * _mm512_loadu_ps(own_y + half * 16);
            total = _mm512_fmadd_ps(_mm512_fmadd_ps(high, _mm512_set1_ps(256), cross), y, total);
        }
        _mm512_storeu_ps(totals + r * 16, total);
    }
};

// sums = the product over `steps` steps: four tiles of 16 x 16 of hi hi, row halves outer, then four of the cross
// terms. v lies in the L1 cache, and w goes past it from the L2 cache; where w is larger, its next tiles are fetched.
// The block before, of the same sums, is dotted while hi hi is formed: tile products leave the vector unit idle.
template <bool large>
void multiply_deep_tiles(int32_t* sums, const int8_t* v, const int8_t* w, int64_t steps, const DeepDots* before) {
    int64_t row = before != nullptr ? 0 : 32, share = ceil_div(32, steps);
    for (int64_t cross = 0; cross < 2; ++cross, sums += 1024) {
        begin_sums(true, nullptr);
        for (int64_t s = 0; s < steps; ++s) {
            const int8_t *left = v + s * deep_bytes, *right = w + s * deep_bytes, *next = right + deep_bytes;
            for (int64_t part = 0; part <= cross; ++part) {
                const int8_t* left_part = left + (cross - part) * 2 * tile_bytes;  // hi; or lo, then hi
                const int8_t* right_part = right + part * 2 * tile_bytes;          // hi; or hi, then lo
                const int8_t* next_part = next + part * 2 * tile_bytes;
                _tile_stream_loadd(6, right_part, 64);
                _tile_stream_loadd(7, right_part + tile_bytes, 64);
                _tile_loadd(4, left_part, 64);
                _tile_loadd(5, left_part + tile_bytes, 64);
                _tile_dpbssd(0, 4, 6);
                if (large) fetch_tile(next_part);
                _tile_dpbssd(1, 4, 7);
                _tile_dpbssd(2, 5, 6);
                if (large) fetch_tile(next_part + tile_bytes);
                _tile_dpbssd(3, 5, 7);
                for (int64_t end = least(32, row + share); row < end; ++row) before->add(row);
            }
        }
        end_sums(sums);
    }
}

// What decides whether fixed point is accurate: the squares of the rows' (columns') largest entries, and all squares.
struct Spread {
    double largest = 0, squares = 0;
    bool readable = true;
    void add(double own_largest, double own_squares, bool own_readable) {
        largest += own_largest;
        squares += own_squares;
        readable = readable && own_readable;
    }
    void add(const Extent& extent) { add(double(extent.largest) * extent.largest, extent.squares, extent.readable()); }
    void add(const Spread& other) { add(other.largest, other.squares, other.readable); }
};

// A block of 32 columns of the weight: its tiles, and the columns' units.
Spread pack_deep_columns(int8_t* tiles, float* unit, float* rows, const Rows& weight, bool transposed, int64_t steps,
                         int64_t block) {
    for (int64_t k = 0; k < steps * deep_step; k += 32) read_square(rows + k * 32, weight, transposed, k, block * 32);
    float largest[32] = {}, squares[32] = {};
    for (int64_t k = 0; k < steps * deep_step; ++k) {
        for (int64_t c = 0; c < 32; ++c) {
            float entry = rows[k * 32 + c] < 0 ? -rows[k * 32 + c] : rows[k * 32 + c];
            largest[c] = entry > largest[c] ? entry : largest[c];
            squares[c] += entry * entry;
        }
    }
    Spread spread;
    for (int64_t c = 0; c < 32; ++c) {
        spread.add(Extent{largest[c], squares[c]});
        unit[c] = largest[c] / units;
    }
    pack_deep_weight(tiles, rows, unit, steps);
    return spread;
}

// Contracts over x. `done` is set when the result is there; else some numbers ask for more than fixed point.
Status run_int8(const View& out, const Rows& x1, const Rows& y1, const Rows& x2, const Rows& y2, const Rows& weight,
                bool transposed, int threads, bool& done) {
    constexpr int64_t most_examples = 2048, sampled = 16;  // one pair in so many tells the spread
    int64_t M = x1.count, N = x2.count, steps = ceil_div(x1.features, deep_step), blocks = ceil_div(y1.features, 32);
    int64_t K = steps * deep_step, O = blocks * 32, chunk = least(N, most_examples);
    int64_t own_steps = ceil_div(steps, ceil_div(steps, deep_block)), own_floats = K * 32 + K + O;
    Workspace space;
    space.plan<int8_t>(blocks * steps * deep_bytes);
    space.plan<int8_t>(threads * own_steps * deep_bytes);
    space.plan<int32_t>(threads * deep_sums);
    space.plan<float>(threads * own_floats);
    space.plan<float>(O);
    space.plan<float>(chunk * K);
    space.plan<float>(chunk * O);
    space.plan<Spread>(blocks);
    space.plan<Spread>(M);
    space.plan<Spread>(threads);
    if (!space.allocate()) return Status::out_of_memory;
    int8_t* w = space.take<int8_t>(blocks * steps * deep_bytes);
    int8_t* all_products = space.take<int8_t>(threads * own_steps * deep_bytes);
    int32_t* all_sums = space.take<int32_t>(threads * deep_sums);
    float* scratch = space.take<float>(threads * own_floats);
    float* unit = space.take<float>(O);
    float* rows_x = space.take<float>(chunk * K);
    float* rows_y = space.take<float>(chunk * O);
    Spread* of_columns = space.take<Spread>(blocks);
    Spread* of_rows = space.take<Spread>(M);
    Spread* of_threads = space.take<Spread>(threads);
    float* result = static_cast<float*>(out.data);
    auto total = [](const Spread* spreads, int64_t count) {
        Spread sum;
        for (int64_t i = 0; i < count; ++i) sum.add(spreads[i]);
        return sum;
    };

    auto multiply = blocks * steps * deep_bytes > near_bytes ? multiply_deep_tiles<true> : multiply_deep_tiles<false>;
    parallel(threads, blocks, [&](int64_t block, int thread) {
        of_columns[block] = pack_deep_columns(w + block * steps * deep_bytes, unit + block * 32,
                                              scratch + thread * own_floats, weight, transposed, steps, block);
    });
    for (int thread = 0; thread < threads; ++thread) of_threads[thread] = Spread();
    for (int64_t first = 0; first < N; first += chunk) {
        int64_t count = least(chunk, N - first), groups = ceil_div(count, 32);
        parallel(threads, groups, [&](int64_t group, int) {
            for (int64_t n = group * 32; n < least(count, group * 32 + 32); ++n) {
                read_padded(rows_x + n * K, x2, first + n, K);
                read_padded(rows_y + n * O, y2, first + n, O);
            }
        });
        if (first == 0) {
            int64_t stride = least(sampled, count);
            parallel(threads, M, [&](int64_t m, int thread) {
                float* row_x = scratch + thread * own_floats;
                read_padded(row_x, x1, m, K);
                of_rows[m] = Spread();
                for (int64_t n = m % stride; n < count; n += stride)
                    of_rows[m].add(extent_of_products(row_x, rows_x + n * K, K));
            });
            Spread columns = total(of_columns, blocks), sample = total(of_rows, M);
            double limit = tolerance / left_out / double(x1.features);
            bool accurate = columns.largest * sample.largest <= limit * limit * columns.squares * sample.squares;
            if (!accurate || !columns.readable || !sample.readable) return Status::ok;
        }
        parallel(threads, M * groups, [&](int64_t task, int thread) {
            int64_t m = task % M, n0 = task / M * 32, height = least(32, count - n0);
            int8_t* products = all_products + thread * own_steps * deep_bytes;
            int32_t* sums = all_sums + thread * deep_sums;
            float* row_x = scratch + thread * own_floats;
            float* row_y = row_x + K;
            float* totals = row_y + O;
            float row_unit[32] = {};
            read_padded(row_x, x1, m, K);
            read_padded(row_y, y1, m, O);
            for (int64_t o = 0; o < O; ++o) row_y[o] *= unit[o];
            for (int64_t r = 0; r < height; ++r) {
                Extent extent = extent_of_products(row_x, rows_x + (n0 + r) * K, K);
                of_threads[thread].readable = of_threads[thread].readable && extent.readable();
                row_unit[r] = extent.largest / units;
            }
            for (int64_t e = 0; e < 32 * 16; ++e) totals[e] = 0;
            _tile_loadconfig(&tile_config);
            for (int64_t s = 0; s < steps; s += own_steps) {
                int64_t end = least(steps, s + own_steps);
                for (int64_t r = 0; r < 32; ++r) {
                    const float* row = rows_x + (n0 + least(r, height - 1)) * K;
                    int8_t* to = products + r / 16 * tile_bytes + r % 16 * deep_step;
                    for (int64_t k = s; k < end; ++k, to += deep_bytes)
                        pack_deep_row(to, row_x + k * deep_step, row + k * deep_step, inverse(row_unit[r]));
                }
                DeepDots before;
                for (int64_t b = 0; b < blocks; ++b) {
                    multiply(sums, products, w + (b * steps + s) * deep_bytes, end - s, b > 0 ? &before : nullptr);
                    before = {sums, row_y + b * 32, rows_y + n0 * O + b * 32, O, height - 1, totals};
                }
                for (int64_t r = 0; r < 32; ++r) before.add(r);
            }
            _tile_release();
            for (int64_t r = 0; r < height; ++r) {
                result[m * out.stride[0] + (first + n0 + r) * out.stride[1]] =
                    row_unit[r] * sum_lanes<float>(load(totals + r * 16)) * 256;
            }
        });
        if (!total(of_threads, threads).readable) return Status::ok;
    }
    done = true;
    return Status::ok;
}

// Contracts over the side that leaves less padding.
Status in_fixed_point(const View& out, const Rows& x1, const Rows& y1, const Rows& x2, const Rows& y2,
                      const Rows& weight, int threads, bool& done) {
    auto products = [](const Rows& x, const Rows& y) {
        return ceil_div(x.features, deep_step) * deep_step * ceil_div(y.features, 32);
    };
    if (products(y1, x1) < products(x1, y1)) return run_int8(out, y1, x1, y2, x2, weight, false, threads, done);
    return run_int8(out, x1, y1, x2, y2, weight, true, threads, done);
}

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp
