// S[m,n] = sum_o y1[m,o] y2[n,o] (sum_i x1[m,i] x2[n,i] weight[i,o]) for float32, on bfloat16 tile products (AMX).
// Each factor v of the inner product is rounded to hi = bf16(v), or kept as hi + lo with lo = bf16(v - hi):
//     bf16:   v w ~ hi_v hi_w                              relative error about 2e-3, at most 8e-3
//     bf16x3: v w ~ hi_v hi_w + hi_v lo_w + lo_v hi_w      relative error about 4e-6, at most 5e-5
// summed in float32. Tiles flush denormals: below 1e-35 lo is lost.
#include "weighted_ghost_dot_int8.h"

namespace ihvp {

namespace avx512 {
Status weighted_ghost_dot(View, View, View, View, View, View, View, View, bool, Precision, int);
}

namespace IHVP_ISA {

namespace {

constexpr int64_t chunk_examples = 2048;
// The longest k block: its split rows, 36 KB, stay in the L1 cache.
template <int pieces>
constexpr int64_t block_steps = 18 / pieces;
template <int pieces>
constexpr int64_t step_elements = 2 * pieces * tile_elements;  // of one operand: two tiles a piece

// 32 numbers as hi, or hi and lo.
template <int pieces>
IHVP_INLINE void split(__m512i (&out)[pieces], __m512 first, __m512 second) {
    for (int p = 0; p < pieces; ++p) {
        out[p] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        __m512i bits_first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(out[p]));
        __m512i bits_second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(out[p], 1));
        first -= _mm512_castsi512_ps(_mm512_slli_epi32(bits_first, 16));
        second -= _mm512_castsi512_ps(_mm512_slli_epi32(bits_second, 16));
    }
}

// A block of 32 columns of the weight: for each step of 32 k and hi and lo two tiles of 16 columns, in which row r
// holds the pairs k = 2 r, 2 r + 1.
template <int pieces>
void pack_weight(uint16_t* out, const Rows& weight, bool rows_are_columns, int64_t steps, int64_t block) {
    float rows[32 * step];
    for (int64_t s = 0; s < steps; ++s) {
        read_square(rows, weight, rows_are_columns, s * step, block * 32);
        uint16_t* tiles = out + (block * steps + s) * step_elements<pieces>;
        for (int64_t half = 0; half < 2; ++half) {
            for (int64_t r = 0; r < 16; ++r) {
                const float* even = rows + 2 * r * 32 + half * 16;
                __m512i values[pieces];
                split(values, _mm512_loadu_ps(even), _mm512_loadu_ps(even + 32));
                for (int p = 0; p < pieces; ++p) {
                    uint16_t bits[32];  // 16 columns of the even k, then of the odd
                    _mm512_storeu_si512(bits, values[p]);
                    uint16_t* to = tiles + (2 * p + half) * tile_elements + r * 32;
                    for (int64_t c = 0; c < 16; ++c) {
                        to[2 * c] = bits[c];
                        to[2 * c + 1] = bits[16 + c];
                    }
                }
            }
        }
    }
}

// The rows n of x1[m] * x2[n] for steps s0..s1: for each step, hi and lo two tiles of 16 rows.
template <int pieces>
void pack_products(uint16_t* out, const float* row1, const float* rows2, int64_t stride, int64_t count, int64_t s0,
                   int64_t s1) {
    for (int64_t s = s0; s < s1; ++s) {
        uint16_t* tiles = out + (s - s0) * step_elements<pieces>;
        __m512 scale_first = _mm512_loadu_ps(row1 + s * step), scale_second = _mm512_loadu_ps(row1 + s * step + 16);
        for (int64_t r = 0; r < 32; ++r) {
            __m512i values[pieces] = {};
            if (r < count) {
                const float* row = rows2 + r * stride + s * step;
                split(values, _mm512_loadu_ps(row) * scale_first, _mm512_loadu_ps(row + 16) * scale_second);
            }
            for (int p = 0; p < pieces; ++p)
                _mm512_storeu_si512(tiles + (2 * p + r / 16) * tile_elements + r % 16 * 32, values[p]);
        }
    }
}

// sums (four tiles of 16 x 16, row halves outer) (+)= the split product over `steps` steps.
template <int pieces>
IHVP_INLINE void multiply_tiles(float* sums, bool first, const uint16_t* x, const uint16_t* w, int64_t steps) {
    begin_sums(first, sums);
    for (int64_t s = 0; s < steps; ++s, x += step_elements<pieces>, w += step_elements<pieces>) {
        const uint16_t* next = w + step_elements<pieces>;
        for (int p = 0; p < pieces; ++p) {
            _tile_loadd(4, x + 2 * p * tile_elements, 64);
            _tile_loadd(5, x + (2 * p + 1) * tile_elements, 64);
            for (int q = 0; p + q < pieces; ++q) {
                _tile_loadd(6, w + 2 * q * tile_elements, 64);
                _tile_loadd(7, w + (2 * q + 1) * tile_elements, 64);
                _tile_dpbf16ps(0, 4, 6);
                if (p == 0) fetch_tile(next + 2 * q * tile_elements);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                if (p == 0) fetch_tile(next + (2 * q + 1) * tile_elements);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    end_sums(sums);
}

template <int pieces>
Status run(const View& out, const Rows& x1, const Rows& y1, const Rows& x2, const Rows& y2, const Rows& weight,
           bool rows_are_columns, int threads) {
    int64_t M = x1.count, N = x2.count, steps = ceil_div(x1.features, step), blocks = ceil_div(y1.features, 32);
    int64_t K = steps * step, O = blocks * 32, chunk = least(N, chunk_examples);
    int64_t own_floats = blocks * 1024 + K + O, own_steps = ceil_div(steps, ceil_div(steps, block_steps<pieces>));
    Workspace space;
    space.plan<uint16_t>(blocks * steps * step_elements<pieces>);
    space.plan<float>(chunk * K);
    space.plan<float>(chunk * O);
    space.plan<float>(threads * own_floats);
    space.plan<uint16_t>(threads * block_steps<pieces> * step_elements<pieces>);
    if (!space.allocate()) return Status::out_of_memory;
    uint16_t* w = space.take<uint16_t>(blocks * steps * step_elements<pieces>);
    float* rows_x = space.take<float>(chunk * K);
    float* rows_y = space.take<float>(chunk * O);
    float* scratch = space.take<float>(threads * own_floats);
    uint16_t* products = space.take<uint16_t>(threads * block_steps<pieces> * step_elements<pieces>);
    float* result = static_cast<float*>(out.data);

    parallel(threads, blocks,
             [&](int64_t block, int) { pack_weight<pieces>(w, weight, rows_are_columns, steps, block); });
    for (int64_t first = 0; first < N; first += chunk) {
        int64_t count = least(chunk, N - first), groups = ceil_div(count, 32);
        parallel(threads, groups, [&](int64_t group, int) {
            for (int64_t n = group * 32; n < least(count, group * 32 + 32); ++n) {
                read_padded(rows_x + n * K, x2, first + n, K);
                read_padded(rows_y + n * O, y2, first + n, O);
            }
        });
        parallel(threads, M * groups, [&](int64_t task, int thread) {
            int64_t m = task % M, n0 = task / M * 32, height = least(32, count - n0);
            float* sums = scratch + thread * own_floats;
            float* row_x = sums + blocks * 1024;
            float* row_y = row_x + K;
            uint16_t* own = products + thread * block_steps<pieces> * step_elements<pieces>;
            read_padded(row_x, x1, m, K);
            read_padded(row_y, y1, m, O);
            _tile_loadconfig(&tile_config);
            for (int64_t s = 0; s < steps; s += own_steps) {
                int64_t end = least(steps, s + own_steps);
                pack_products<pieces>(own, row_x, rows_x + n0 * K, K, height, s, end);
                for (int64_t b = 0; b < blocks; ++b)
                    multiply_tiles<pieces>(sums + b * 1024, s == 0, own, w + (b * steps + s) * step_elements<pieces>,
                                           end - s);
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
                          bool bias, Precision precision, int threads) {
    bool small = weight.shape[0] * weight.shape[1] < 4096;  // tiles would be mostly padding
    bool plain = precision == Precision::float32 || precision == Precision::int16;
    if (out.dtype == DType::f64 || plain || small)
        return avx512::weighted_ghost_dot(out, a1, delta1, a2, delta2, weight, mask1, mask2, bias, precision, threads);
    Rows x1 = token_rows(a1, mask1, bias), x2 = token_rows(a2, mask2, bias);
    Rows y1 = token_rows(delta1, mask1, false), y2 = token_rows(delta2, mask2, false);
    Rows w = matrix_rows(weight);
    if (precision == Precision::int8x3) {
        bool done = false;
        Status status = in_fixed_point(out, x1, y1, x2, y2, w, threads, done);
        if (done || status != Status::ok) return status;
    }
    bool swap = y1.features > x1.features;  // contract over the longer side
    auto kernel = precision == Precision::bf16 ? run<1> : run<2>;
    return swap ? kernel(out, y1, x1, y2, x2, w, false, threads) : kernel(out, x1, y1, x2, y2, w, true, threads);
}

}  // namespace IHVP_ISA
}  // namespace ihvp
