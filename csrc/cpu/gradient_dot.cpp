// S[q,n] = sum_t delta[n,t]^T P[q] a[n,t], or S[q,n,t] without the sum.
// query_first: (delta P[q])[m,i] by one product a query, then a row dot with a.
// gradient_first: see gradient_first.h.
#include "gradient_first.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

template <class T>
Status query_first(const View& out, const View& P, const Rows& a, const Rows& delta, int64_t N, int64_t positions,
                   bool per_token, int threads) {
    constexpr int64_t W = Panels<T>::width, chunk_positions = 2048, lanes = Lanes<T>::width;
    constexpr int64_t group = block_rows;  // columns of P[q] at a time
    int64_t Q = P.shape[0], I = a.features, O = delta.features;
    int64_t examples = chunk_of_examples(N, positions, chunk_positions), depth = examples * positions;
    Workspace space;
    space.plan<T>(Left<T>::size(O, depth));
    space.plan<T>(Panels<T>::size(depth, I));
    space.plan<T>(threads * (O * group + depth * lanes));
    space.plan<T>(Q * depth);
    if (!space.allocate()) return Status::out_of_memory;
    T* memory_d = space.take<T>(Left<T>::size(O, depth));
    T* memory_x = space.take<T>(Panels<T>::size(depth, I));
    T* scratch = space.take<T>(threads * (O * group + depth * lanes));
    T* dots = space.take<T>(Q * depth);
    T* result = static_cast<T*>(out.data);
    for (int64_t first = 0; first < N; first += examples) {
        int64_t count = least(examples, N - first), rows = count * positions;
        Left<T> d{memory_d, O, rows};
        Panels<T> x{memory_x, rows, I};
        pack_transposed(d, delta, first * positions, threads);
        pack_straight(x, a, first * positions, threads);
        int64_t panels = ceil_div(rows, W), blocks = Q >= 2 * threads ? 1 : least(panels, ceil_div(2 * threads, Q));
        int64_t block = ceil_div(panels, blocks) * W;
        parallel(threads, Q * blocks, [&](int64_t task, int thread) {
            int64_t q = task / blocks, i0 = task % blocks * block, i1 = least(rows, i0 + block);
            T* packed = scratch + thread * (O * group + depth * lanes);
            T* sums = packed + O * group;
            Rows query = matrix_rows(entry(P, q));
            for (int64_t e = i0 * lanes; e < i1 * lanes; ++e) sums[e] = 0;
            for (int64_t c0 = 0; c0 < I; c0 += group) {
                Panels<T> part{packed, O, least(group, I - c0)};
                pack_straight(part, query, 0, 0, O, c0);
                product(d, i0, i1, part, 0, part.count(), [&](const Tile<T>& tile, int64_t i, int64_t j) {
                    int height = int(least(tile_rows, i1 - i));
                    for (int r = 0; r < height; ++r) {
                        T* at = sums + (i + r) * lanes;
                        Vec<T> sum = load(at);
                        const T* row = x.at(i + r, c0 + j);
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

}  // namespace

Status gradient_dot(View out, View P, View a, View delta, View mask, bool bias, bool per_token, Order order,
                    int threads) {
    Rows rows_a = token_rows(a, mask, bias), rows_delta = token_rows(delta, mask, false);
    Group one{&P, &a, &delta, mask, bias, 1};
    return IHVP_COMPUTE(out.dtype == DType::f64, [&](auto zero) {
        using T = decltype(zero);
        if (order == Order::gradient_first) return gradient_first<T>(out, one, threads);
        return query_first<T>(out, P, rows_a, rows_delta, a.shape[0], a.shape[1], per_token, threads);
    });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
