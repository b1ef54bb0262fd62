// S[m,n] = sum_oi weight[o,i] g_m[o,i] g_n[o,i] at T = 1, where g = delta a^T:
//        = sum_o delta1[m,o] delta2[n,o] (sum_i a1[m,i] a2[n,i] weight[o,i]).
// One product over pairs (m,n): its first operand is a2's panel scaled by a row of a1, its second the weight,
// which stays packed; the other two factors are a row dot on the finished tile. No g is formed.
#include "engine.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

constexpr int64_t chunk_examples = 2048;

template <class T>
Status run(const View& out, const Rows& x1, const Rows& y1, const Rows& x2, const Rows& y2, const Rows& weight,
           bool rows_are_columns, int threads) {
    constexpr int64_t W = Panels<T>::width;
    int64_t M = x1.count, N = x2.count, I = x1.features, O = y1.features;
    int64_t depth = least(N, chunk_examples), padded = ceil_div(O, W) * W;
    Workspace space;
    space.plan<T>(Panels<T>::size(I, O));
    space.plan<T>(Panels<T>::size(I, depth));
    space.plan<T>(Panels<T>::size(depth, O));
    space.plan<T>(threads * (I * W + I + padded));
    if (!space.allocate()) return Status::out_of_memory;
    Panels<T> w{space.take<T>(Panels<T>::size(I, O)), I, O};
    if (rows_are_columns) {
        pack_transposed(w, weight, 0, threads);
    } else {
        pack_straight(w, weight, 0, threads);
    }
    T* memory_x = space.take<T>(Panels<T>::size(I, depth));
    T* memory_y = space.take<T>(Panels<T>::size(depth, O));
    T* scratch = space.take<T>(threads * (I * W + I + padded));
    T* result = static_cast<T*>(out.data);
    for (int64_t first = 0; first < N; first += depth) {
        int64_t count = least(depth, N - first);
        Panels<T> x{memory_x, I, count}, y{memory_y, count, O};
        pack_transposed(x, x2, first, threads);
        pack_straight(y, y2, first, threads);
        parallel(threads, M * x.count(), [&](int64_t task, int thread) {
            int64_t m = task / x.count(), p = task % x.count(), columns = least(W, count - p * W);
            T* own = scratch + thread * (I * W + I + padded);
            Panels<T> scaled{own, I, columns};
            T* row_x = own + I * W;
            T* row_y = row_x + I;
            x1.read(row_x, m, 0, I);
            y1.read(row_y, m, 0, O);
            for (int64_t c = O; c < padded; ++c) row_y[c] = 0;
            const T* in = x.at(0, p * W);
            for (int64_t k = 0; k < I; ++k) {
                for (int64_t c = 0; c < W; ++c) own[k * W + c] = in[k * W + c] * row_x[k];
            }
            Vec<T> sums[W] = {};
            product(scaled, 0, columns, w, 0, w.count(), [&](const Tile<T>& tile, int64_t i, int64_t j) {
                int rows = int(least(tile_rows, columns - i));
                for (int v = 0; v < tile.vectors; ++v) {
                    Vec<T> left = load(row_y + j + v * Lanes<T>::width);
                    for (int r = 0; r < rows; ++r)
                        sums[i + r] += tile.acc[r][v] * left * load(y.at(p * W + i + r, j) + v * Lanes<T>::width);
                }
            });
            for (int64_t c = 0; c < columns; ++c)
                result[m * out.stride[0] + (first + p * W + c) * out.stride[1]] = sum_lanes<T>(sums[c]);
        });
    }
    return Status::ok;
}

}  // namespace

Status weighted_ghost_dot(View out, View a1, View delta1, View a2, View delta2, View weight, View mask1, View mask2,
                          bool bias, Precision, int threads) {
    Rows x1 = token_rows(a1, mask1, bias), x2 = token_rows(a2, mask2, bias);
    Rows y1 = token_rows(delta1, mask1, false), y2 = token_rows(delta2, mask2, false);
    bool swap = y1.features > x1.features;  // contract over the longer side
    return IHVP_COMPUTE(out.dtype == DType::f64, [&](auto zero) {
        using T = decltype(zero);
        return swap ? run<T>(out, y1, x1, y2, x2, matrix_rows(weight), false, threads)
                    : run<T>(out, x1, y1, x2, y2, matrix_rows(weight), true, threads);
    });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
