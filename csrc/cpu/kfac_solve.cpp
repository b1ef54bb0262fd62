// out[q] = G^-1 V[q] A^-1 with A = L_A L_A^T, G = L_G L_G^T: a forward and a backward substitution on each side,
// for a panel of columns at a time. Rows already solved enter as one product; the tile's own triangle is solved
// in registers.
#include "engine.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

// L and its transpose, both with their rows as k.
template <class T>
struct Factor {
    Panels<T> lower, upper;  // lower(k, j) = L[k, j], upper(k, j) = L[j, k]
};

template <class T>
Factor<T> pack_factor(Workspace& space, const View& L, int64_t d, int threads) {
    Factor<T> f{{space.take<T>(Panels<T>::size(d, d)), d, d}, {space.take<T>(Panels<T>::size(d, d)), d, d}};
    pack_straight(f.lower, matrix_rows(L), 0, threads);
    pack_straight(f.upper, matrix_rows(L, true), 0, threads);
    return f;
}

// x (k = j, one panel of columns) <- (L L^T)^-1 x.
template <class T>
void substitute(const Panels<T>& x, const Factor<T>& f) {
    constexpr int lanes = Lanes<T>::width;
    int64_t d = x.depth;
    Tile<T> tile;
    // L y = x
    for (int64_t j = 0; j < d; j += tile_rows) {
        int rows = int(least(tile_rows, d - j));
        multiply(tile, f.upper, j, x, 0, 0, j);
        for (int v = 0; v < tile.vectors; ++v) {
            for (int r = 0; r < rows; ++r) {
                Vec<T> value = load(x.at(j + r, 0) + v * lanes) - tile.acc[r][v];
                for (int s = 0; s < r; ++s) value -= tile.acc[s][v] * *f.upper.at(j + s, j + r);
                tile.acc[r][v] = value / *f.upper.at(j + r, j + r);
                store(x.at(j + r, 0) + v * lanes, tile.acc[r][v]);
            }
        }
    }
    // L^T z = y
    for (int64_t j = (d - 1) / tile_rows * tile_rows; j >= 0; j -= tile_rows) {
        int rows = int(least(tile_rows, d - j));
        multiply(tile, f.lower, j, x, 0, j + rows, d);
        for (int v = 0; v < tile.vectors; ++v) {
            for (int r = rows - 1; r >= 0; --r) {
                Vec<T> value = load(x.at(j + r, 0) + v * lanes) - tile.acc[r][v];
                for (int s = r + 1; s < rows; ++s) value -= tile.acc[s][v] * *f.lower.at(j + s, j + r);
                tile.acc[r][v] = value / *f.lower.at(j + r, j + r);
                store(x.at(j + r, 0) + v * lanes, tile.acc[r][v]);
            }
        }
    }
}

template <class T>
Status run(const View& out, const View& V, const View& L_A, const View& L_G, int threads) {
    constexpr int64_t W = Panels<T>::width;
    int64_t Q = V.shape[0], O = V.shape[1], I = V.shape[2];
    Workspace space;
    for (int i = 0; i < 2; ++i) {
        space.plan<T>(Panels<T>::size(I, I));
        space.plan<T>(Panels<T>::size(O, O));
    }
    space.plan<T>(threads * most(I, O) * W);
    if (!space.allocate()) return Status::out_of_memory;
    Factor<T> A = pack_factor<T>(space, L_A, I, threads), G = pack_factor<T>(space, L_G, O, threads);
    T* scratch = space.take<T>(threads * most(I, O) * W);
    int64_t panels_I = ceil_div(I, W), panels_O = ceil_div(O, W);
    parallel(threads, Q * panels_I, [&](int64_t task, int thread) {
        int64_t q = task / panels_I, c0 = task % panels_I * W;
        Panels<T> x{scratch + thread * most(I, O) * W, O, least(W, I - c0)};
        Rows rows = matrix_rows(entry(V, q));
        T* target = static_cast<T*>(entry(out, q).data);
        for (int64_t k = 0; k < O; ++k) {
            rows.read(x.at(k, 0), k, c0, c0 + x.columns);
            for (int64_t c = x.columns; c < W; ++c) *x.at(k, c) = 0;
        }
        substitute(x, G);
        for (int64_t k = 0; k < O; ++k) {
            for (int64_t c = 0; c < x.columns; ++c) target[k * out.stride[1] + (c0 + c) * out.stride[2]] = *x.at(k, c);
        }
    });
    parallel(threads, Q * panels_O, [&](int64_t task, int thread) {
        int64_t q = task / panels_O, c0 = task % panels_O * W;
        Panels<T> x{scratch + thread * most(I, O) * W, I, least(W, O - c0)};
        T* target = static_cast<T*>(entry(out, q).data);
        pack_transposed(x, 0, matrix_rows(entry(out, q)), c0);
        substitute(x, A);
        for (int64_t c = 0; c < x.columns; ++c) {
            for (int64_t k = 0; k < I; ++k) target[(c0 + c) * out.stride[1] + k * out.stride[2]] = *x.at(k, c);
        }
    });
    return Status::ok;
}

}  // namespace

Status kfac_solve(View out, View V, View L_A, View L_G, int threads) {
    return IHVP_COMPUTE(out.dtype == DType::f64,
                        [&](auto zero) { return run<decltype(zero)>(out, V, L_A, L_G, threads); });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
