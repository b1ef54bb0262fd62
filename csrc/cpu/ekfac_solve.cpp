// out[d,q] = U_G ((U_G^T V[q] U_A) / (Lambda + damping[d])) U_A^T; all dampings share the first two products, and the
// division is the epilogue of the second. A few queries at a time go through the four products together, so that one
// packed basis is enough.
#include "epilogue.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

// Stores into panels, divided by (Lambda + damping) of the tile's place; the tile's rows are inputs.
template <class T>
struct StoreDivided {
    Left<T> out;
    Rows eigenvalues;  // transposed: row i, column o
    T damping;
    IHVP_INLINE void operator()(const Tile<T>& tile, int64_t i, int64_t j) const {
        constexpr int64_t W = Panels<T>::width;
        int rows = int(least(tile_rows, out.depth - i));
        T divisors[tile_rows * W];
        int64_t columns = least(W, out.columns - j);
        for (int r = 0; r < rows; ++r) {
            eigenvalues.read(divisors + r * W, i + r, j, j + columns);
            for (int64_t c = columns; c < W; ++c) divisors[r * W + c] = 1;  // padding: never infinite
            for (int v = 0; v < tile_vectors; ++v) {
                Vec<T> x = v < tile.vectors ? tile.acc[r][v] : Vec<T>{};
                int64_t c = v * Lanes<T>::width;
                out.put(i + r, j + c, x / (load(divisors + r * W + c) + damping));
            }
        }
    }
};

// Rows first..end of y through the same epilogue.
template <class T>
void divide(const Panels<T>& y, int64_t first, int64_t end, const StoreDivided<T>& finish) {
    for (int64_t j = 0; j < y.columns; j += Panels<T>::width) {
        for (int64_t i = first; i < end; i += tile_rows) {
            Tile<T> tile = {};
            tile.vectors = tile_vectors;
            for (int64_t r = 0; r < least(tile_rows, end - i); ++r) {
                for (int v = 0; v < tile_vectors; ++v) tile.acc[r][v] = load(y.at(i + r, j) + v * Lanes<T>::width);
            }
            finish(tile, i, j);
        }
    }
}

template <class T>
Status run(const View& out, const View& V, const View& U_A, const View& U_G, const View& Lambda, const double* damping,
           int threads) {
    int64_t D = out.shape[0], Q = V.shape[0], O = V.shape[1], I = V.shape[2];
    int64_t by_input = Panels<T>::size(I, O), by_output = Panels<T>::size(O, I);  // k = i, k = o
    int64_t together = least(Q, threads);
    Workspace space;
    space.plan<T>(Panels<T>::size(most(I, O), most(I, O)));
    space.plan<T>(together * by_input);
    space.plan<T>(together * by_output);
    if (D > 1) space.plan<T>(together * by_input);
    if (!space.allocate()) return Status::out_of_memory;
    T* basis_memory = space.take<T>(Panels<T>::size(most(I, O), most(I, O)));
    T* memory_y = space.take<T>(together * by_input);
    T* memory_x = space.take<T>(together * by_output);
    T* memory_z = D > 1 ? space.take<T>(together * by_input) : memory_y;
    auto basis = [&](const View& U, int64_t d, bool transposed) {
        Panels<T> panels{basis_memory, d, d};
        pack_straight(panels, matrix_rows(U, transposed), 0, threads);
        return panels;
    };
    auto by_blocks = [&](int64_t count, int64_t rows, auto task) {
        int64_t blocks = ceil_div(rows, product_rows<T>);
        parallel(threads, count * blocks, [&](int64_t index, int) {
            int64_t first = index % blocks * product_rows<T>;
            task(index / blocks, first, least(rows, first + product_rows<T>));
        });
    };
    Rows eigenvalues = matrix_rows(Lambda, true);
    for (int64_t q0 = 0; q0 < Q; q0 += together) {
        int64_t count = least(together, Q - q0);
        auto v = [&](int64_t q) { return Left<T>{memory_y + q * by_input, I, O}; };
        auto x = [&](int64_t q) { return Left<T>{memory_x + q * by_output, O, I}; };
        auto y = [&](int64_t q) { return Panels<T>{memory_y + q * by_input, I, O}; };  // where several divide it
        auto z = [&](int64_t q) { return Left<T>{memory_z + q * by_input, I, O}; };
        auto w = [&](int64_t q) { return Panels<T>{memory_x + q * by_output, O, I}; };
        Panels<T> U = basis(U_A, I, false);
        by_blocks(count, O, [&](int64_t q, int64_t first, int64_t end) {  // V U_A: k = o
            Rows rows = matrix_rows(entry(V, q0 + q));
            for (int64_t u = first / Left<T>::unit; u * Left<T>::unit < end; ++u) pack_transposed(v(q), u, rows, 0);
            product(v(q), first, end, U, 0, U.count(), StorePanels<T, false, tile_rows>{x(q)});
        });
        U = basis(U_G, O, false);
        by_blocks(count, I, [&](int64_t q, int64_t first, int64_t end) {  // (U_G^T V U_A)^T: k = i
            if (D > 1) {
                product(x(q), first, end, U, 0, U.count(), StorePanels<T, false>{y(q)});
            } else {
                product(x(q), first, end, U, 0, U.count(), StoreDivided<T>{z(q), eigenvalues, T(damping[0])});
            }
        });
        for (int64_t d = 0; d < D; ++d) {
            if (D > 1) {
                by_blocks(count, I, [&](int64_t q, int64_t first, int64_t end) {
                    divide(y(q), first, end, {z(q), eigenvalues, T(damping[d])});
                });
            }
            U = basis(U_A, I, true);
            by_blocks(count, O, [&](int64_t q, int64_t first, int64_t end) {  // k = o'
                product(z(q), first, end, U, 0, U.count(), StorePanels<T, false>{w(q)});
            });
            Left<T> rows_G{basis_memory, O, O};
            pack_straight(rows_G, matrix_rows(U_G, true), 0, threads);
            by_blocks(count, O, [&](int64_t q, int64_t first, int64_t end) {
                product(rows_G, first, end, w(q), 0, w(q).count(),
                        matrix_target<T, T, false>(entry(entry(out, d), q0 + q)));
            });
        }
    }
    return Status::ok;
}

}  // namespace

Status ekfac_solve(View out, View V, View U_A, View U_G, View Lambda, const double* damping, int threads) {
    return IHVP_COMPUTE(out.dtype == DType::f64,
                        [&](auto zero) { return run<decltype(zero)>(out, V, U_A, U_G, Lambda, damping, threads); });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
