// S[q,n] = sum_t delta[n,t]^T P[q] a[n,t], or S[q,n,t] without the sum.
// query_first: (delta P[q])[m,i] by one product a query, then a row dot with a.
// gradient_first: g_n = sum_t delta a^T a block at a time, then dots of blocks of P and g; g is never whole.
#include "engine.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

template <class T>
Status query_first(const View& out, const View& P, const Rows& a, const Rows& delta, int64_t N, int64_t positions,
                   bool per_token, int threads) {
    constexpr int64_t W = Panels<T>::width, chunk_positions = 2048, lanes = Lanes<T>::width;
    int64_t Q = P.shape[0], I = a.features, O = delta.features;
    int64_t examples = chunk_of_examples(N, positions, chunk_positions), depth = examples * positions;
    Workspace space;
    space.plan<T>(Panels<T>::size(O, depth));
    space.plan<T>(Panels<T>::size(depth, I));
    space.plan<T>(threads * (O * W + depth * lanes));
    space.plan<T>(Q * depth);
    if (!space.allocate()) return Status::out_of_memory;
    T* memory_d = space.take<T>(Panels<T>::size(O, depth));
    T* memory_x = space.take<T>(Panels<T>::size(depth, I));
    T* scratch = space.take<T>(threads * (O * W + depth * lanes));
    T* dots = space.take<T>(Q * depth);
    T* result = static_cast<T*>(out.data);
    for (int64_t first = 0; first < N; first += examples) {
        int64_t count = least(examples, N - first), rows = count * positions;
        Panels<T> d{memory_d, O, rows}, x{memory_x, rows, I};
        pack_transposed(d, delta, first * positions, threads);
        pack_straight(x, a, first * positions, threads);
        int64_t blocks = Q >= 2 * threads ? 1 : least(d.count(), ceil_div(2 * threads, Q));
        int64_t block = ceil_div(d.count(), blocks) * W;
        parallel(threads, Q * blocks, [&](int64_t task, int thread) {
            int64_t q = task / blocks, i0 = task % blocks * block, i1 = least(rows, i0 + block);
            T* packed = scratch + thread * (O * W + depth * lanes);
            T* sums = packed + O * W;
            Rows query = matrix_rows(entry(P, q));
            for (int64_t e = i0 * lanes; e < i1 * lanes; ++e) sums[e] = 0;
            for (int64_t p = 0; p < x.count(); ++p) {
                // One panel of P[q]: rows k = o, columns i of panel p.
                Panels<T> part{packed, O, least(W, I - p * W)};
                for (int64_t k = 0; k < O; ++k) {
                    query.read(packed + k * W, k, p * W, p * W + part.columns);
                    for (int64_t c = part.columns; c < W; ++c) packed[k * W + c] = 0;
                }
                product(d, i0, i1, part, 0, 1, [&](const Tile<T>& tile, int64_t i, int64_t) {
                    int height = int(least(tile_rows, i1 - i));
                    for (int r = 0; r < height; ++r) {
                        T* at = sums + (i + r) * lanes;
                        Vec<T> sum = load(at);
                        const T* row = x.at(i + r, p * W);
                        for (int v = 0; v < tile.vectors; ++v) sum += tile.acc[r][v] * load(row + v * lanes);
                        store(at, sum);
                    }
                });
            }
            for (int64_t i = i0; i < i1; ++i) dots[q * depth + i] = sum_lanes<T>(load(sums + i * lanes));
        });
        for (int64_t q = 0; q < Q; ++q) {
            for (int64_t n = 0; n < count; ++n) {
                const T* at = dots + q * depth + n * positions;
                T* target = result + q * out.stride[0] + (first + n) * out.stride[1];
                if (per_token) {
                    for (int64_t t = 0; t < positions; ++t) target[t * out.stride[2]] = at[t];
                } else {
                    T sum = 0;
                    for (int64_t t = 0; t < positions; ++t) sum += at[t];
                    *target = sum;
                }
            }
        }
    }
    return Status::ok;
}

// The dot tile: queries x examples, vectors along the parameters.
constexpr int dot_queries = tile_rows >= 8 ? 4 : 2;
constexpr int dot_examples = tile_rows >= 8 ? 6 : 4;

template <class T>
IHVP_INLINE void dot_tile(T* out, int64_t stride_out, const T* p, const T* g, int64_t length) {
    Vec<T> acc[dot_queries][dot_examples] = {};
    for (int64_t k = 0; k < length; k += Lanes<T>::width) {
        Vec<T> b[dot_examples];
#pragma GCC unroll 8
        for (int j = 0; j < dot_examples; ++j) b[j] = load(g + j * length + k);
#pragma GCC unroll 8
        for (int i = 0; i < dot_queries; ++i) {
            Vec<T> a = load(p + i * length + k);
#pragma GCC unroll 8
            for (int j = 0; j < dot_examples; ++j) acc[i][j] += a * b[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < dot_queries; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < dot_examples; ++j) out[i * stride_out + j] += sum_lanes<T>(acc[i][j]);
    }
}

template <class T>
Status gradient_first(const View& out, const View& P, const Rows& a, const Rows& delta, int64_t N, int64_t positions,
                      int threads) {
    constexpr int64_t W = Panels<T>::width;
    constexpr int64_t block_outputs = 16;  // rows of a block of g: a dot tile's operands stay in the L1 cache
    constexpr int64_t parts = 16;          // sums kept apart, so that their order does not follow the threads
    static_assert(block_outputs % tile_rows == 0, "a block holds whole tiles");
    int64_t Q = P.shape[0], I = a.features, O = delta.features;
    int64_t examples = least(64, chunk_of_examples(N, positions, 2048)), depth = examples * positions;
    int64_t length = block_outputs * W;
    int64_t rows_q = ceil_div(Q, dot_queries) * dot_queries, rows_n = ceil_div(examples, dot_examples) * dot_examples;
    Workspace space;
    space.plan<T>(Panels<T>::size(depth, O));
    space.plan<T>(Panels<T>::size(depth, I));
    space.plan<T>(threads * (rows_n + dot_queries) * length);
    space.plan<T>(parts * rows_q * rows_n);
    if (!space.allocate()) return Status::out_of_memory;
    T* memory_d = space.take<T>(Panels<T>::size(depth, O));
    T* memory_x = space.take<T>(Panels<T>::size(depth, I));
    T* scratch = space.take<T>(threads * (rows_n + dot_queries) * length);
    T* sums = space.take<T>(parts * rows_q * rows_n);
    T* result = static_cast<T*>(out.data);
    for (int64_t e = 0; e < threads * (rows_n + dot_queries) * length; ++e) scratch[e] = 0;
    for (int64_t first = 0; first < N; first += examples) {
        int64_t count = least(examples, N - first);
        Panels<T> d{memory_d, count * positions, O}, x{memory_x, count * positions, I};
        pack_straight(d, delta, first * positions, threads);
        pack_straight(x, a, first * positions, threads);
        for (int64_t e = 0; e < parts * rows_q * rows_n; ++e) sums[e] = 0;
        int64_t blocks = ceil_div(O, block_outputs) * x.count();
        parallel(threads, parts, [&](int64_t part, int thread) {
            T* g = scratch + thread * (rows_n + dot_queries) * length;
            T* queries = g + rows_n * length;
            T* own = sums + part * rows_q * rows_n;
            for (int64_t b = part; b < blocks; b += parts) {
                int64_t p = b % x.count(), o0 = b / x.count() * block_outputs, o1 = least(O, o0 + block_outputs);
                int64_t c1 = least(I, (p + 1) * W);
                for (int64_t n = 0; n < count; ++n) {
                    for (int64_t i = o0; i < o0 + block_outputs; i += tile_rows) {
                        T* at = g + n * length + (i - o0) * W;
                        Tile<T> tile = {};
                        if (i < o1) multiply(tile, d, i, x, p, n * positions, (n + 1) * positions);
                        for (int r = 0; r < tile_rows; ++r) {
                            for (int v = 0; v < tile_vectors; ++v) {
                                store(at + r * W + v * Lanes<T>::width, v < tile.vectors ? tile.acc[r][v] : Vec<T>{});
                            }
                        }
                    }
                }
                for (int64_t q = 0; q < Q; q += dot_queries) {
                    for (int64_t e = 0; e < least(dot_queries, Q - q); ++e) {
                        Rows query = matrix_rows(entry(P, q + e));
                        for (int64_t o = o0; o < o1; ++o) query.read(queries + e * length + (o - o0) * W, o, p * W, c1);
                        // What an earlier block left in the padding meets zeros in g; it must be finite there.
                        for (int64_t o = 0; o < block_outputs; ++o) {
                            int64_t from = o < o1 - o0 ? c1 - p * W : 0;
                            for (int64_t c = from; c < W; ++c) queries[e * length + o * W + c] = 0;
                        }
                    }
                    for (int64_t n = 0; n < count; n += dot_examples)
                        dot_tile(own + q * rows_n + n, rows_n, queries, g + n * length, length);
                }
            }
        });
        for (int64_t q = 0; q < Q; ++q) {
            for (int64_t n = 0; n < count; ++n) {
                T sum = 0;
                for (int64_t part = 0; part < parts; ++part) sum += sums[(part * rows_q + q) * rows_n + n];
                result[q * out.stride[0] + (first + n) * out.stride[1]] = sum;
            }
        }
    }
    return Status::ok;
}

}  // namespace

Status gradient_dot(View out, View P, View a, View delta, View mask, bool bias, bool per_token, Order order,
                    int threads) {
    Rows rows_a = token_rows(a, mask, bias), rows_delta = token_rows(delta, mask, false);
    return IHVP_COMPUTE(out.dtype == DType::f64, [&](auto zero) {
        using T = decltype(zero);
        if (order == Order::gradient_first)
            return gradient_first<T>(out, P, rows_a, rows_delta, a.shape[0], a.shape[1], threads);
        return query_first<T>(out, P, rows_a, rows_delta, a.shape[0], a.shape[1], per_token, threads);
    });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
