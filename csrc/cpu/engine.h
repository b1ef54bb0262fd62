// The engine: packed panels, one register tile, and what may follow it.
//
// Every product here is X^T Y for two operands that share their row index k:
//     tile[i, j] = sum_k X[k, i] Y[k, j]
// An operand is packed into panels of PANEL columns, panel p holding rows 0..depth contiguously:
//     X[k, p * PANEL + c] = data[(p * depth + k) * PANEL + c],   columns past the end are zero.
// The tile of a product comes out with its own rows in k order of the next product, so chained products
// (rotate, divide, rotate back) store straight into panels and never repack. What happens to a finished tile
// is a template argument, called as finish(tile, i, j): store, add, square and add, row dot.
#pragma once
#include <cstdlib>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "rows.h"

namespace ihvp {
namespace IHVP_ISA {
namespace {

// One block of memory for a kernel's whole workspace; nothing is allocated inside a parallel region.
struct Workspace {
    char* base = nullptr;
    size_t size = 0, used = 0;

    template <class T>
    void plan(int64_t count) {
        size += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    }
    bool allocate() {
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, size > 0 ? size : 64) != 0) return false;
        base = static_cast<char*>(memory);
        return true;
    }
    template <class T>
    T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(base + used);
        used += (size_t(count) * sizeof(T) + 63) / 64 * 64;
        return p;
    }
    ~Workspace() { std::free(base); }
};

// Calls task(index, thread) for every index. Which thread gets which index is not fixed, so a task writes only
// to what its index or its thread owns. One thread enters no parallel region: a fork after one would hang.
template <class F>
void parallel(int threads, int64_t count, const F& task) {
#ifdef _OPENMP
    if (threads > 1 && count > 1) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < count; ++i) task(i, omp_get_thread_num());
        }
        return;
    }
#endif
    for (int64_t i = 0; i < count; ++i) task(i, 0);
}

template <class T>
struct Panels {
    T* data;
    int64_t depth, columns;
    static constexpr int64_t width = Lanes<T>::panel;

    int64_t count() const { return ceil_div(columns, width); }
    T* at(int64_t row, int64_t column) const { return data + (column / width * depth + row) * width + column % width; }
    static int64_t size(int64_t depth, int64_t columns) { return ceil_div(columns, width) * width * depth; }
};

// Rows of the source become rows k of the panels: here rows k0..k1, read whole so that each is found once.
template <class T>
void pack_straight(const Panels<T>& out, const Rows& in, int64_t first_row, int64_t k0, int64_t k1) {
    constexpr int64_t W = Panels<T>::width, block = 1024 / W * W;
    T buffer[block];
    for (int64_t c0 = 0; c0 < out.columns; c0 += block) {
        int64_t count = least(block, out.columns - c0);
        for (int64_t k = k0; k < k1; ++k) {
            in.read(buffer, first_row + k, c0, c0 + count);
            for (int64_t c = count; c % W != 0; ++c) buffer[c] = 0;
            for (int64_t c = 0; c < count; c += W) std::memcpy(out.at(k, c0 + c), buffer + c, W * sizeof(T));
        }
    }
}

// Rows of the source become columns of the panels.
template <class T>
void pack_transposed(const Panels<T>& out, int64_t panel, const Rows& in, int64_t first_row) {
    constexpr int64_t W = Panels<T>::width, block = 64;
    T buffer[W * block];
    int64_t columns = least(W, out.columns - panel * W);
    for (int64_t k0 = 0; k0 < out.depth; k0 += block) {
        int64_t k1 = least(k0 + block, out.depth);
        for (int64_t c = 0; c < columns; ++c) in.read(buffer + c * block, first_row + panel * W + c, k0, k1);
        for (int64_t k = k0; k < k1; ++k) {
            T* row = out.at(k, panel * W);
            for (int64_t c = 0; c < columns; ++c) row[c] = buffer[c * block + k - k0];
            for (int64_t c = columns; c < W; ++c) row[c] = 0;
        }
    }
}

template <class T>
void pack_straight(const Panels<T>& out, const Rows& in, int64_t first_row, int threads) {
    constexpr int64_t rows = 64;  // a task: enough to be worth handing out
    parallel(threads, ceil_div(out.depth, rows), [&](int64_t block, int) {
        pack_straight(out, in, first_row, block * rows, least(out.depth, (block + 1) * rows));
    });
}

template <class T>
void pack_transposed(const Panels<T>& out, const Rows& in, int64_t first_row, int threads) {
    parallel(threads, out.count(), [&](int64_t p, int) { pack_transposed(out, p, in, first_row); });
}

template <class T>
struct Tile {
    Vec<T> acc[tile_rows][tile_vectors];
    int vectors = 0;  // in use: fewer in the last panel
};

template <class T, int vectors>
IHVP_INLINE void multiply(Tile<T>& tile, int64_t depth, const T* __restrict x, const T* __restrict y) {
    constexpr int W = Lanes<T>::width, P = Lanes<T>::panel;
    Vec<T> acc[tile_rows][vectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vec<T> b[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) b[v] = load<T>(y + v * W);
#pragma GCC unroll 16
        for (int r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) acc[r][v] += b[v] * x[r];
        }
        x += P;
        y += P;
    }
#pragma GCC unroll 16
    for (int r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) tile.acc[r][v] = acc[r][v];
    }
}

// The tile at rows i.. of X's columns and panel p of Y, over the rows k0..k1 of both.
template <class T>
IHVP_INLINE void multiply(Tile<T>& tile, const Panels<T>& x, int64_t i, const Panels<T>& y, int64_t p, int64_t k0,
                          int64_t k1) {
    constexpr int64_t P = Lanes<T>::panel;
    const T* a = x.at(k0, i);
    const T* b = y.data + (p * y.depth + k0) * P;
    int64_t left = ceil_div(y.columns - p * P, Lanes<T>::width);
    tile.vectors = left < tile_vectors ? int(left) : tile_vectors;
    switch (tile.vectors) {
        case 1:
            return multiply<T, 1>(tile, k1 - k0, a, b);
#if IHVP_TILE_VECTORS > 2
        case 2:
            return multiply<T, 2>(tile, k1 - k0, a, b);
#endif
#if IHVP_TILE_VECTORS > 3
        case 3:
            return multiply<T, 3>(tile, k1 - k0, a, b);
#endif
        default:
            return multiply<T, tile_vectors>(tile, k1 - k0, a, b);
    }
}

// X^T Y for the columns i0..i1 of X and the panels p0..p1 of Y, all of k.
template <class T, class Finish>
IHVP_INLINE void product(const Panels<T>& x, int64_t i0, int64_t i1, const Panels<T>& y, int64_t p0, int64_t p1,
                         const Finish& finish) {
    for (int64_t p = p0; p < p1; ++p) {
        for (int64_t i = i0; i < i1; i += tile_rows) {
            Tile<T> tile;
            multiply(tile, x, i, y, p, 0, x.depth);
            finish(tile, i, p * Panels<T>::width);
        }
    }
}

// --- what follows a tile -----------------------------------------------------------------------------------

// Tile rows i.. become rows k of `out`. Rows past the end of X are dropped, columns past the end are zero.
template <class T, bool square>
struct StorePanels {
    Panels<T> out;
    IHVP_INLINE void operator()(const Tile<T>& tile, int64_t i, int64_t j) const {
        int rows = int(least(tile_rows, out.depth - i));
        for (int r = 0; r < rows; ++r) {
            T* row = out.at(i + r, j);
            for (int v = 0; v < tile_vectors; ++v) {
                Vec<T> x = v < tile.vectors ? tile.acc[r][v] : Vec<T>{};
                store(row + v * Lanes<T>::width, square ? x * x : x);
            }
        }
    }
};

// out[i, j] (= or +=) tile, for a matrix of any strides, float or double, and its mirror image where asked.
template <class T, class S, bool add>
struct StoreMatrix {
    S* out;
    int64_t rows, columns, stride_row, stride_column;
    IHVP_INLINE void operator()(const Tile<T>& tile, int64_t i, int64_t j) const {
        T spilled[Lanes<T>::panel];
        int height = int(least(tile_rows, rows - i)), width = int(least(Lanes<T>::panel, columns - j));
        for (int r = 0; r < height; ++r) {
            for (int v = 0; v < tile.vectors; ++v) store(spilled + v * Lanes<T>::width, tile.acc[r][v]);
            S* row = out + (i + r) * stride_row + j * stride_column;
            if (stride_column == 1) {
                for (int c = 0; c < width; ++c) row[c] = add ? S(row[c] + S(spilled[c])) : S(spilled[c]);
            } else {
                for (int c = 0; c < width; ++c) {
                    S& at = row[c * stride_column];
                    at = add ? S(at + S(spilled[c])) : S(spilled[c]);
                }
            }
        }
    }
};

template <class T, class S, bool add>
StoreMatrix<T, S, add> matrix_target(const View& m) {
    int r = m.dims - 2;
    return {static_cast<S*>(m.data), m.shape[r], m.shape[r + 1], m.stride[r], m.stride[r + 1]};
}

// --- tokens into the eigenbasis ------------------------------------------------------------------------------

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

// out[m, c] = sum_k x[m, k] U[k, c] for the positions first.. of x, as panels with k = m; squared where asked.
// `scratch` holds one panel of depth d per thread.
template <class T, bool square>
void project(const Panels<T>& out, const Rows& x, int64_t first, const Panels<T>& basis, T* scratch, int threads) {
    constexpr int64_t W = Panels<T>::width;
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
    parallel(threads, ceil_div(out.depth, W), [&](int64_t p, int thread) {
        Panels<T> part{scratch + thread * basis.depth * W, basis.depth, least(W, out.depth - p * W)};
        pack_transposed(part, 0, x, first + p * W);
        StorePanels<T, square> finish{out};
        product(part, 0, part.columns, basis, 0, basis.count(),
                [&](const Tile<T>& tile, int64_t i, int64_t j) { finish(tile, p * W + i, j); });
    });
}

// The same with the roles exchanged: panels with k = c and the positions as columns, for the products that
// contract over features.
template <class T, bool square>
void project_features(const Panels<T>& out, const Rows& x, int64_t first, const Panels<T>& basis, T* scratch,
                      int threads) {
    constexpr int64_t W = Panels<T>::width;
    parallel(threads, out.count(), [&](int64_t p, int thread) {
        Panels<T> target{out.at(0, p * W), out.depth, least(W, out.columns - p * W)};
        if (!basis.data) {
            pack_transposed(target, 0, x, first + p * W);
            if (square) {
                for (int64_t e = 0; e < target.depth * W; ++e) target.data[e] *= target.data[e];
            }
            return;
        }
        Panels<T> part{scratch + thread * basis.depth * W, basis.depth, target.columns};
        pack_transposed(part, 0, x, first + p * W);
        product(basis, 0, basis.columns, part, 0, 1, StorePanels<T, square>{target});
    });
}

// Examples of T positions each whose tokens fit a budget: enough to keep the tiles busy, not so many that the
// workspace follows N.
IHVP_INLINE int64_t chunk_of_examples(int64_t N, int64_t T, int64_t positions) {
    return most(1, least(N, positions / most(T, 1)));
}

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp

// Runs f(zero of the compute type): double when any operand is double.
#define IHVP_COMPUTE(is_double, f) ((is_double) ? f(double(0)) : f(float(0)))
