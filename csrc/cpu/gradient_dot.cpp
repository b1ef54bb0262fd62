// S[q,n] = sum_t delta[n,t]^T P[q] a[n,t], or S[q,n,t] without the sum.
// query_first: (delta P[q])[m,i] by one product a query, then a row dot with a.
// gradient_first: see gradient_first.h.
#include "gradient_first.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

// A tile's rows times those of x, added to each row's sum.
template <class T>
struct RowDots {
    T* sums;
    const Panels<T>& x;
    int64_t end;
    static constexpr int64_t lanes = Lanes<T>::width;

    IHVP_INLINE void operator()(const Tile<T>& tile, int64_t i, int64_t j) const {
        int height = int(least(tile_rows, end - i));
        for (int r = 0; r < height; ++r) {
            T* at = sums + (i + r) * lanes;
            Vec<T> sum = load(at);
            const T* row = x.at(i + r, j);
            for (int v = 0; v < tile.vectors; ++v) sum += tile.acc[r][v] * load(row + v * lanes);
            store(at, sum);
        }
    }
};

template <class T>
Status query_first(const View& out, const View& P, const Rows& a, const Rows& delta, int64_t N, int64_t positions,
                   bool per_token, int threads) {
    constexpr int64_t W = Panels<T>::width, lanes = Lanes<T>::width;
    constexpr int64_t chunk_positions = 2048, block_positions = 384;  // of a product: d stays in the L2 cache
    int64_t Q = P.shape[0], I = a.features, O = delta.features;
    int64_t examples = chunk_of_examples(N, positions, chunk_positions), depth = examples * positions;
    int64_t size_panel = Panels<T>::size(O, W), own = 2 * size_panel + block_positions * lanes;
    Workspace space;
    space.plan<T>(Left<T>::size(O, depth));
    space.plan<T>(Panels<T>::size(depth, I));
    space.plan<T>(threads * own);
    space.plan<T>(Q * depth);
    if (!space.allocate()) return Status::out_of_memory;
    T* memory_d = space.take<T>(Left<T>::size(O, depth));
    T* memory_x = space.take<T>(Panels<T>::size(depth, I));
    T* scratch = space.take<T>(threads * own);
    T* dots = space.take<T>(Q * depth);
    T* result = static_cast<T*>(out.data);
    for (int64_t first = 0; first < N; first += examples) {
        int64_t count = least(examples, N - first), rows = count * positions;
        Left<T> d{memory_d, O, rows};
        Panels<T> x{memory_x, rows, I};
        pack_transposed(d, delta, first * positions, threads);
        pack_straight(x, a, first * positions, threads);
        int64_t blocks = most(ceil_div(rows, block_positions), least(ceil_div(rows, W), ceil_div(2 * threads, Q)));
        int64_t block = ceil_div(ceil_div(rows, blocks), tile_rows) * tile_rows;
        parallel(threads, Q * blocks, [&](int64_t task, int thread) {
            int64_t q = task / blocks, i0 = task % blocks * block, i1 = least(rows, i0 + block);
            if (i0 >= i1) return;
            T* packed = scratch + thread * own;
            T* sums = packed + 2 * size_panel - i0 * lanes;
            Rows query = matrix_rows(entry(P, q));
            for (int64_t e = i0 * lanes; e < i1 * lanes; ++e) sums[e] = 0;
            product_packing(d, i0, i1, query, 0, I, packed, RowDots<T>{sums, x, i1});
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
                    Precision precision, int threads) {
    Rows rows_a = token_rows(a, mask, bias), rows_delta = token_rows(delta, mask, false);
    Group one{&P, &a, &delta, mask, bias, 1};
    return IHVP_COMPUTE(out.dtype == DType::f64, [&](auto zero) {
        using T = decltype(zero);
        if (order == Order::gradient_first) return gradient_first<T>(out, one, precision, threads);
        return query_first<T>(out, P, rows_a, rows_delta, a.shape[0], a.shape[1], per_token, threads);
    });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
