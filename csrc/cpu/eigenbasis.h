// Tokens into the eigenbasis: the packed basis, and the projections that leave their result packed for the next
// product.
#pragma once
#include "epilogue.h"

namespace ihvp {
namespace IHVP_ISA {
namespace {

// U with its rows as k, or nothing where the basis is the standard one.
template <class T>
Panels<T> pack_basis(Workspace& space, const View& U, int64_t d, bool transposed, int threads) {
    Panels<T> panels{U.data ? space.take<T>(Panels<T>::size(d, d)) : nullptr, d, d};
    if (U.data) pack_straight(panels, matrix_rows(U, transposed), 0, threads);
    return panels;
}

template <class T>
int64_t basis_size(const View& U, int64_t d) {
    return U.data ? Panels<T>::size(d, d) : 0;
}

// Positions that a thread takes at a time: whole panels, few enough for every thread to have some.
template <class T>
int64_t rows_of_a_task(int64_t positions, int threads) {
    constexpr int64_t W = Panels<T>::width;
    return most(1, least(product_rows<T> / W, ceil_div(positions, W) / (2 * threads))) * W;
}

// Elements of such a task's packed positions, `depth` features each.
template <class T>
int64_t task_size(int64_t depth) {
    return depth * most(product_rows<T>, Panels<T>::width);
}

// sum_k x[m, k] U[k, c] for `count` positions from `first` on, packed into `scratch`, which holds task_size of d
// elements, or, where a tile's rows lie in the L1 cache together, read from where they are.
template <class T, class Finish>
IHVP_INLINE void multiply_rows(const Rows& x, int64_t first, int64_t count, const Panels<T>& basis, T* scratch,
                               const Finish& finish) {
    constexpr int64_t most_depth = 128;
    const T* data = lying_row<T>(x, first);
    int64_t stride = row_stride(x);
    if (basis.depth <= most_depth && data != nullptr && stride != 0 && count % tile_rows == 0)
        return product(Lying<T>{data, stride, basis.depth, count}, 0, count, basis, 0, basis.count(), finish);
    Left<T> part{scratch, basis.depth, count};
    for (int64_t u = 0; u < part.units(); ++u) pack_transposed(part, u, x, first);
    product(part, 0, count, basis, 0, basis.count(), finish);
}

// out[m, c] = sum_k x[m, k] U[k, c] for the positions first.. of x, as panels with k = m; squared where asked.
// `scratch` holds task_size of d elements per thread.
template <class T, bool square, int64_t W>
void project(const Panels<T, W>& out, const Rows& x, int64_t first, const Panels<T>& basis, T* scratch, int threads) {
    if (!basis.data) {
        pack_straight(out, x, first, threads);
        if (square) {
            parallel(threads, out.count(), [&](int64_t p, int) {
                T* values = out.at(0, p * W);
                for (int64_t e = 0; e < out.depth * W; ++e) values[e] *= values[e];
            });
        }
        return;
    }
    StorePanels<T, square, W> finish{out};
    int64_t rows = rows_of_a_task<T>(out.depth, threads);
    parallel(threads, ceil_div(out.depth, rows), [&](int64_t block, int thread) {
        int64_t at = block * rows;
        multiply_rows(x, first + at, least(rows, out.depth - at), basis, scratch + thread * task_size<T>(basis.depth),
                      [&](const Tile<T>& tile, int64_t i, int64_t j) { finish(tile, at + i, j); });
    });
}

// The same with the roles exchanged: panels with k = c and the positions as columns, for the products that
// contract over features.
template <class T, bool square>
void project_features(const Left<T>& out, const Rows& x, int64_t first, const Panels<T>& basis, T* scratch,
                      int threads) {
    constexpr int64_t W = Panels<T>::width;
    parallel(threads, ceil_div(out.columns, W), [&](int64_t p, int thread) {
        Left<T> target{out.at(0, p * W), out.depth, least(W, out.columns - p * W)};
        if (!basis.data) {
            for (int64_t u = 0; u < target.units(); ++u) pack_transposed(target, u, x, first + p * W);
            if (square) {
                for (int64_t e = 0; e < Left<T>::size(target.depth, target.columns); ++e)
                    target.data[e] *= target.data[e];
            }
            return;
        }
        Panels<T> part{scratch + thread * task_size<T>(basis.depth), basis.depth, target.columns};
        pack_transposed(part, 0, x, first + p * W);
        product(basis, 0, basis.columns, part, 0, 1, StorePanels<T, square, tile_rows>{target});
    });
}

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp
