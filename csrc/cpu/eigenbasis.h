// Tokens into the eigenbasis: the packed basis, and the projections that leave their result packed for the next
// product.
#pragma once
#include "epilogue.h"

namespace ihvp {
namespace IHVP_ISA {
namespace {

// A basis, its rows as k: packed whole, or, for few positions, a panel at a time by the thread that uses it. No data
// where it is the standard one.
template <class T>
struct Basis {
    Rows U;
    int64_t d;
    Panels<T> packed;

    bool standard() const { return U.data == nullptr; }
    bool few() const { return packed.data == nullptr; }
};

constexpr int64_t many_positions = int64_t(1) << 60;  // a basis is packed whole

// Few: a panel of the basis is used for two blocks of them at most.
template <class T>
bool few_positions(int64_t d, int64_t positions) {
    return d > 128 && positions <= 2 * product_rows<T>;
}

template <class T>
int64_t basis_size(const View& U, int64_t d, int64_t positions) {
    return U.data && !few_positions<T>(d, positions) ? Panels<T>::size(d, d) : 0;
}

template <class T>
Basis<T> take_basis(Workspace& space, const View& U, int64_t d, int64_t positions, int threads) {
    int64_t size = basis_size<T>(U, d, positions);
    Basis<T> basis{U.data ? matrix_rows(U) : Rows{}, d, {size > 0 ? space.take<T>(size) : nullptr, d, d}};
    if (size > 0) pack_straight(basis.packed, basis.U, 0, threads);
    return basis;
}

// Positions that a thread takes at a time: as many in each task, the same number of tasks for every thread.
template <class T>
int64_t rows_of_a_task(int64_t positions, int threads) {
    constexpr int64_t unit = Left<T>::unit;
    static_assert(unit % tile_rows == 0 && product_rows<T> % unit == 0, "whole tiles");
    int64_t tasks = ceil_div(most(1, ceil_div(positions, product_rows<T>)), threads) * threads;
    if (threads > 1) tasks = most(tasks, 2 * threads);
    return ceil_div(most(1, ceil_div(positions, tasks)), unit) * unit;
}

// Elements of such a task's packed positions, `depth` features each.
template <class T>
int64_t task_size(int64_t depth) {
    return depth * most(product_rows<T>, Panels<T>::width);
}

// Elements of scratch that all threads need to project up to `positions` of d features.
template <class T>
int64_t scratch_size(int64_t d, int64_t positions, int threads) {
    if (!few_positions<T>(d, positions)) return threads * task_size<T>(d);
    return Left<T>::size(d, positions) + threads * 2 * Panels<T>::size(d, Panels<T>::width);
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

// finish(tile, m, c) of sum_k x[first + m, k] U[k, c], for `count` positions.
template <class T, class Finish>
void multiply_basis(const Rows& x, int64_t first, int64_t count, const Basis<T>& basis, T* scratch, int threads,
                    const Finish& finish) {
    if (basis.few()) {
        constexpr int64_t W = Panels<T>::width;
        Left<T> left{scratch, basis.d, count};
        pack_transposed(left, x, first, threads);
        T* memory = scratch + Left<T>::size(basis.d, count);
        int64_t panels = ceil_div(basis.d, W), tasks = least(panels, threads > 1 ? 2 * threads : 1);
        parallel(threads, tasks, [&](int64_t task, int thread) {
            int64_t c0 = task * panels / tasks * W, c1 = least(basis.d, (task + 1) * panels / tasks * W);
            product_packing(left, 0, count, basis.U, c0, c1, memory + thread * 2 * Panels<T>::size(basis.d, W), finish);
        });
        return;
    }
    int64_t rows = rows_of_a_task<T>(count, threads);
    parallel(threads, ceil_div(count, rows), [&](int64_t block, int thread) {
        int64_t at = block * rows;
        multiply_rows(x, first + at, least(rows, count - at), basis.packed, scratch + thread * task_size<T>(basis.d),
                      Shifted<T, Finish>{finish, at, 0});
    });
}

// out[m, c] = sum_k x[m, k] U[k, c] for the positions first.. of x, as panels with k = m; squared where asked.
template <class T, bool square, int64_t W>
void project(const Panels<T, W>& out, const Rows& x, int64_t first, const Basis<T>& basis, T* scratch, int threads) {
    if (!basis.standard()) {
        StorePanels<T, square, W> finish{out};
        return multiply_basis(x, first, out.depth, basis, scratch, threads, finish);
    }
    pack_straight(out, x, first, threads);
    if (!square) return;
    parallel(threads, out.count(), [&](int64_t p, int) {
        T* values = out.at(0, p * W);
        for (int64_t e = 0; e < out.depth * W; ++e) values[e] *= values[e];
    });
}

// The same with the roles exchanged: panels with k = c and the positions as columns, for the products that
// contract over features.
template <class T, bool square>
void project_features(const Left<T>& out, const Rows& x, int64_t first, const Basis<T>& basis, T* scratch,
                      int threads) {
    constexpr int64_t W = Panels<T>::width;
    parallel(threads, ceil_div(out.columns, W), [&](int64_t p, int thread) {
        Left<T> target{out.at(0, p * W), out.depth, least(W, out.columns - p * W)};
        if (basis.standard()) {
            for (int64_t u = 0; u < target.units(); ++u) pack_transposed(target, u, x, first + p * W);
            if (square) {
                for (int64_t e = 0; e < Left<T>::size(target.depth, target.columns); ++e)
                    target.data[e] *= target.data[e];
            }
            return;
        }
        Panels<T> part{scratch + thread * task_size<T>(basis.d), basis.d, target.columns};
        pack_transposed(part, 0, x, first + p * W);
        product(basis.packed, 0, basis.d, part, 0, 1, StorePanels<T, square, tile_rows>{target});
    });
}

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp
