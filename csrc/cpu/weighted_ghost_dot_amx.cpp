// S[m,n] = sum_o y1[m,o] y2[n,o] (sum_i x1[m,i] x2[n,i] weight[i,o]) for float32, on bfloat16 tile products (AMX).
// Each factor v of the inner product is split into hi = bf16(v), lo = bf16(v - hi), and
//     v w ~ hi_v hi_w + hi_v lo_w + lo_v hi_w,
// summed in float32: what is dropped is below 2^-17 of a term, so errors stay those of a float32 product (about 3e-6
// relative), at three bfloat16 products for one. Numbers below 1e-35 lose their lo part: tiles flush denormals.
#include <immintrin.h>

#include "engine.h"

namespace ihvp {

namespace avx512 {
Status weighted_ghost_dot(View, View, View, View, View, View, View, View, bool, int);
}

namespace IHVP_ISA {

namespace {

constexpr int64_t chunk_examples = 2048;
constexpr int64_t step = 32;            // k of one tile product
constexpr int64_t tile_elements = 512;  // bfloat16 numbers of a tile: 16 rows of 32
constexpr int64_t block_steps = 8;      // k block: its split rows, 32 KB, stay in the L1 cache

struct __attribute__((packed)) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Split {
    __m512i hi, lo;
};

// 32 numbers as bfloat16 pairs.
IHVP_INLINE Split split(__m512 first, __m512 second) {
    __m512i hi = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    __m512i bits_first = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(hi)), 16);
    __m512i bits_second = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(hi, 1)), 16);
    __m512 rest_first = first - _mm512_castsi512_ps(bits_first);
    __m512 rest_second = second - _mm512_castsi512_ps(bits_second);
    return {hi, (__m512i)_mm512_cvtne2ps_pbh(rest_second, rest_first)};
}

// The weight as tiles: for each block of 32 columns and each step of 32 k the tiles hi 0, lo 0, lo 1, hi 1 of its two
// halves, in which row r holds the pairs k = 2 r, 2 r + 1 of 16 columns.
void pack_weight(uint16_t* out, const Rows& weight, int64_t steps, int64_t block, float* rows) {
    int64_t columns = least(32, weight.features - block * 32);
    for (int64_t s = 0; s < steps; ++s) {
        for (int64_t k = 0; k < step; ++k) {
            float* row = rows + k * 32;
            for (int64_t c = 0; c < 32; ++c) row[c] = 0;
            if (s * step + k < weight.count) weight.read(row, s * step + k, block * 32, block * 32 + columns);
        }
        uint16_t* tiles = out + (block * steps + s) * 4 * tile_elements;
        for (int64_t half = 0; half < 2; ++half) {
            for (int64_t r = 0; r < 16; ++r) {
                Split s_even = split(_mm512_loadu_ps(rows + 2 * r * 32 + half * 16),
                                     _mm512_loadu_ps(rows + (2 * r + 1) * 32 + half * 16));
                // (even columns, odd columns) to pairs
                uint16_t hi[32], lo[32];
                _mm512_storeu_si512(hi, s_even.hi);
                _mm512_storeu_si512(lo, s_even.lo);
                uint16_t* to_hi = tiles + (half == 0 ? 0 : 3) * tile_elements + r * 32;
                uint16_t* to_lo = tiles + (half == 0 ? 1 : 2) * tile_elements + r * 32;
                for (int64_t c = 0; c < 16; ++c) {
                    to_hi[2 * c] = hi[c];
                    to_hi[2 * c + 1] = hi[16 + c];
                    to_lo[2 * c] = lo[c];
                    to_lo[2 * c + 1] = lo[16 + c];
                }
            }
        }
    }
}

// The rows n of x1[m] * x2[n] for steps s0..s1 as tiles hi 0, hi 1, lo 0, lo 1 of 16 rows each.
void pack_products(uint16_t* out, const float* row1, const float* rows2, int64_t stride, int64_t count, int64_t s0,
                   int64_t s1) {
    for (int64_t s = s0; s < s1; ++s) {
        uint16_t* tiles = out + (s - s0) * 4 * tile_elements;
        __m512 scale_first = _mm512_loadu_ps(row1 + s * step), scale_second = _mm512_loadu_ps(row1 + s * step + 16);
        for (int64_t r = 0; r < 32; ++r) {
            Split value = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            if (r < count) {
                const float* row = rows2 + r * stride + s * step;
                value = split(_mm512_loadu_ps(row) * scale_first, _mm512_loadu_ps(row + 16) * scale_second);
            }
            _mm512_storeu_si512(tiles + r / 16 * tile_elements + r % 16 * 32, value.hi);
            _mm512_storeu_si512(tiles + (2 + r / 16) * tile_elements + r % 16 * 32, value.lo);
        }
    }
}

// sums (four tiles of 16 x 16, row halves outer) (+)= the split product over `steps` steps.
IHVP_INLINE void multiply_tiles(float* sums, bool first, const uint16_t* x, const uint16_t* w, int64_t steps) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
    }
    for (int64_t s = 0; s < steps; ++s, x += 4 * tile_elements, w += 4 * tile_elements) {
        _tile_loadd(4, x, 64);
        _tile_loadd(5, x + tile_elements, 64);
        _tile_loadd(6, w, 64);
        _tile_loadd(7, w + tile_elements, 64);
        _tile_dpbf16ps(0, 4, 6);  // hi x hi, left half
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(0, 4, 7);  // hi x lo
        _tile_dpbf16ps(2, 5, 7);
        _tile_loadd(7, w + 2 * tile_elements, 64);
        _tile_dpbf16ps(1, 4, 7);  // hi x lo, right half
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(7, w + 3 * tile_elements, 64);
        _tile_dpbf16ps(1, 4, 7);  // hi x hi
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(4, x + 2 * tile_elements, 64);
        _tile_loadd(5, x + 3 * tile_elements, 64);
        _tile_dpbf16ps(0, 4, 6);  // lo x hi
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

void read_padded(float* out, const Rows& rows, int64_t row, int64_t padded) {
    rows.read(out, row, 0, rows.features);
    for (int64_t c = rows.features; c < padded; ++c) out[c] = 0;
}

Status run(const View& out, const Rows& x1, const Rows& y1, const Rows& x2, const Rows& y2, const Rows& weight,
           int threads) {
    int64_t M = x1.count, N = x2.count, steps = ceil_div(x1.features, step), blocks = ceil_div(y1.features, 32);
    int64_t K = steps * step, O = blocks * 32, chunk = least(N, chunk_examples);
    int64_t own_floats = blocks * 1024 + K + O;
    Workspace space;
    space.plan<uint16_t>(blocks * steps * 4 * tile_elements);
    space.plan<float>(chunk * K);
    space.plan<float>(chunk * O);
    space.plan<float>(threads * own_floats);
    space.plan<uint16_t>(threads * block_steps * 4 * tile_elements);
    if (!space.allocate()) return Status::out_of_memory;
    uint16_t* w = space.take<uint16_t>(blocks * steps * 4 * tile_elements);
    float* rows_x = space.take<float>(chunk * K);
    float* rows_y = space.take<float>(chunk * O);
    float* scratch = space.take<float>(threads * own_floats);
    uint16_t* products = space.take<uint16_t>(threads * block_steps * 4 * tile_elements);
    float* result = static_cast<float*>(out.data);

    parallel(threads, blocks,
             [&](int64_t block, int thread) { pack_weight(w, weight, steps, block, scratch + thread * own_floats); });
    for (int64_t first = 0; first < N; first += chunk) {
        int64_t count = least(chunk, N - first), groups = ceil_div(count, 32);
        parallel(threads, groups, [&](int64_t group, int) {
            for (int64_t n = group * 32; n < least(count, group * 32 + 32); ++n) {
                read_padded(rows_x + n * K, x2, first + n, K);
                read_padded(rows_y + n * O, y2, first + n, O);
            }
        });
        parallel(threads, M * groups, [&](int64_t task, int thread) {
            int64_t m = task / groups, n0 = task % groups * 32, height = least(32, count - n0);
            float* sums = scratch + thread * own_floats;
            float* row_x = sums + blocks * 1024;
            float* row_y = row_x + K;
            uint16_t* own = products + thread * block_steps * 4 * tile_elements;
            read_padded(row_x, x1, m, K);
            read_padded(row_y, y1, m, O);
            TileConfig config;
            _tile_loadconfig(&config);
            for (int64_t s = 0; s < steps; s += block_steps) {
                int64_t end = least(steps, s + block_steps);
                pack_products(own, row_x, rows_x + n0 * K, K, height, s, end);
                for (int64_t b = 0; b < blocks; ++b)
                    multiply_tiles(sums + b * 1024, s == 0, own, w + (b * steps + s) * 4 * tile_elements, end - s);
            }
            _tile_release();
            for (int64_t r = 0; r < height; ++r) {
                __m512 total = _mm512_setzero_ps();
                const float* left = rows_y + (n0 + r) * O;
                for (int64_t b = 0; b < blocks; ++b) {
                    for (int64_t half = 0; half < 2; ++half) {
                        int64_t at = b * 32 + half * 16;
                        __m512 tile = _mm512_loadu_ps(sums + b * 1024 + (r / 16 * 2 + half) * 256 + r % 16 * 16);
                        total += tile * _mm512_loadu_ps(row_y + at) * _mm512_loadu_ps(left + at);
                    }
                }
                result[m * out.stride[0] + (first + n0 + r) * out.stride[1]] = sum_lanes<float>(total);
            }
        });
    }
    return Status::ok;
}

}  // namespace

Status weighted_ghost_dot(View out, View a1, View delta1, View a2, View delta2, View weight, View mask1, View mask2,
                          bool bias, int threads) {
    // Small weights would be mostly padding, and in sums of few terms a split product's error shows.
    bool small = weight.shape[0] * weight.shape[1] < 4096;
    if (out.dtype == DType::f64 || small)
        return avx512::weighted_ghost_dot(out, a1, delta1, a2, delta2, weight, mask1, mask2, bias, threads);
    Rows x1 = token_rows(a1, mask1, bias), x2 = token_rows(a2, mask2, bias);
    Rows y1 = token_rows(delta1, mask1, false), y2 = token_rows(delta2, mask2, false);
    bool swap = y1.features > x1.features;  // contract over the longer side
    return swap ? run(out, y1, x1, y2, x2, matrix_rows(weight), threads)
                : run(out, x1, y1, x2, y2, matrix_rows(weight, true), threads);
}

}  // namespace IHVP_ISA
}  // namespace ihvp
