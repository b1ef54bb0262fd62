// Lambda[o,i] += sum_n (sum_t d[n,t,o] x[n,t,i])^2 with x = a U_A, d = delta U_G (project_first),
//              = sum_n (U_G^T g_n U_A)[o,i]^2 with g_n = sum_t delta a^T       (gradient_first).
// At T = 1 the square of the product is the product of the squares, and the sum over n is one plain product.
#include "eigenbasis.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

// Positions of a chunk: their tokens fill two tiles of O x I, where that keeps the kernels busy.
int64_t positions_of_chunk(int64_t O, int64_t I) { return most(768, least(1024, 2 * O * I / most(O + I, 1))); }

// The tile's squares, added to a sum.
template <class T>
struct IntoSquares {
    Tile<T>& sum;
    static constexpr bool more = false;

    IHVP_INLINE Vec<T> first(int, int) const { return Vec<T>{}; }
    IHVP_INLINE void last(int r, int v, Vec<T> x) const { sum.acc[r][v] += x * x; }
};

// Lambda += sum over the chunk, a tile at a time: one tile is owned by one thread and sums its examples in order.
template <class T, class S>
void add_squares(const View& Lambda, const Left<T>& d, const Panels<T>& x, int64_t positions, int threads) {
    constexpr int64_t W = Panels<T>::width;
    auto add = matrix_target<T, S, true>(Lambda);
    if (positions == 1) return product(d, x, threads, add);  // the panels hold squares
    parallel(threads, ceil_div(d.columns, W) * x.count(), [&](int64_t task, int) {
        int64_t p = task % x.count(), first = task / x.count() * W, end = least(d.columns, first + W);
        const char* next = reinterpret_cast<const char*>(x.at(0, (p + 1) % x.count() * W));
        int64_t share = W * int64_t(sizeof(T)) * tile_rows / (end - first);
        for (int64_t i = first; i < end; i += tile_rows) {
            Tile<T> sum = {};
            for (int64_t k = 0; k < d.depth; k += positions, next += positions * share)
                sum.vectors = multiply<T>(IntoSquares<T>{sum}, d, i, x, p, k, k + positions, Ahead{next, share});
            add(sum, i, p * W);
        }
    });
}

template <class T, class S>
Status project_first(const View& Lambda, const Rows& a, const Rows& delta, int64_t N, int64_t positions,
                     const View& U_A, const View& U_G, int threads) {
    int64_t I = a.features, O = delta.features;
    int64_t examples = chunk_of_examples(N, positions, positions_of_chunk(O, I)), depth = examples * positions;
    Workspace space;
    space.plan<T>(basis_size<T>(U_A, I, N * positions));
    space.plan<T>(basis_size<T>(U_G, O, N * positions));
    space.plan<T>(Panels<T>::size(depth, I));
    space.plan<T>(Left<T>::size(depth, O));
    int64_t size_scratch = most(scratch_size<T>(I, N * positions, threads), scratch_size<T>(O, N * positions, threads));
    space.plan<T>(size_scratch);
    if (!space.allocate()) return Status::out_of_memory;
    Basis<T> basis_A = take_basis<T>(space, U_A, I, N * positions, threads);
    Basis<T> basis_G = take_basis<T>(space, U_G, O, N * positions, threads);
    Panels<T> x{space.take<T>(Panels<T>::size(depth, I)), depth, I};
    Left<T> d{space.take<T>(Left<T>::size(depth, O)), depth, O};
    T* scratch = space.take<T>(size_scratch);
    for (int64_t first = 0; first < N; first += examples) {
        x.depth = d.depth = least(examples, N - first) * positions;
        if (positions == 1) {
            project<T, true>(x, a, first, basis_A, scratch, threads);
            project<T, true>(d, delta, first, basis_G, scratch, threads);
        } else {
            project<T, false>(x, a, first * positions, basis_A, scratch, threads);
            project<T, false>(d, delta, first * positions, basis_G, scratch, threads);
        }
        add_squares<T, S>(Lambda, d, x, positions, threads);
    }
    return Status::ok;
}

template <class T, class S>
struct AddSquares {
    StoreMatrix<T, S, true> add;
    IHVP_INLINE void operator()(Tile<T>& tile, int64_t i, int64_t j) const {
        for (int r = 0; r < tile_rows; ++r) {
            for (int v = 0; v < tile.vectors; ++v) tile.acc[r][v] *= tile.acc[r][v];
        }
        add(tile, i, j);
    }
};

// The products of one example are parallel over panels; g is summed over blocks of positions.
template <class T, class S>
Status gradient_first(const View& Lambda, const Rows& a, const Rows& delta, int64_t N, int64_t positions,
                      const View& U_A, const View& U_G, int threads) {
    constexpr int64_t W = Panels<T>::width;
    int64_t I = a.features, O = delta.features, depth = least(positions, positions_of_chunk(O, I));
    Workspace space;
    space.plan<T>(basis_size<T>(U_A, I, many_positions));
    space.plan<T>(basis_size<T>(U_G, O, many_positions));
    space.plan<T>(Panels<T>::size(depth, I));
    space.plan<T>(Panels<T>::size(depth, O));
    space.plan<T>(Panels<T>::size(O, I));
    space.plan<T>(Panels<T>::size(I, O));
    if (!space.allocate()) return Status::out_of_memory;
    Panels<T> basis_A = take_basis<T>(space, U_A, I, many_positions, threads).packed;
    Panels<T> basis_G = take_basis<T>(space, U_G, O, many_positions, threads).packed;
    Panels<T> x{space.take<T>(Panels<T>::size(depth, I)), depth, I};
    Panels<T> d{space.take<T>(Panels<T>::size(depth, O)), depth, O};
    Panels<T> g{space.take<T>(Panels<T>::size(O, I)), O, I};     // k = o
    Panels<T> half{space.take<T>(Panels<T>::size(I, O)), I, O};  // (U_G^T g)^T: k = i
    AddSquares<T, S> add{matrix_target<T, S, true>(Lambda)};
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t t = 0; t < positions; t += depth) {
            x.depth = d.depth = least(depth, positions - t);
            pack_straight(x, a, n * positions + t, threads);
            pack_straight(d, delta, n * positions + t, threads);
            parallel(threads, x.count(), [&](int64_t p, int) {
                product(d, 0, O, x, p, p + 1, [&](const Tile<T>& tile, int64_t i, int64_t j) {
                    if (t == 0) return StorePanels<T, false>{g}(tile, i, j);
                    Tile<T> sum = tile;
                    int rows = int(least(tile_rows, O - i));
                    for (int r = 0; r < rows; ++r) {
                        for (int v = 0; v < tile.vectors; ++v) {
                            sum.acc[r][v] += load(g.at(i + r, j) + v * Lanes<T>::width);
                        }
                    }
                    StorePanels<T, false>{g}(sum, i, j);
                });
            });
        }
        parallel(threads, g.count(), [&](int64_t p, int) {
            product(g, p * W, least(I, (p + 1) * W), basis_G, 0, basis_G.count(), StorePanels<T, false>{half});
        });
        parallel(threads, half.count() * basis_A.count(), [&](int64_t task, int) {
            int64_t p = task / basis_A.count(), j = task % basis_A.count();
            for (int64_t i = p * W; i < least(O, (p + 1) * W); i += tile_rows) {
                Tile<T> tile;
                multiply(tile, half, i, basis_A, j, 0, I);
                add(tile, i, j * W);
            }
        });
    }
    return Status::ok;
}

template <class T, class S>
Status update(const View& Lambda, const View& a, const View& delta, const View& U_A, const View& U_G, const View& mask,
              bool bias, Order order, int threads) {
    Rows rows_a = token_rows(a, mask, bias), rows_delta = token_rows(delta, mask, false);
    auto run = order == Order::gradient_first ? gradient_first<T, S> : project_first<T, S>;
    return run(Lambda, rows_a, rows_delta, a.shape[0], a.shape[1], U_A, U_G, threads);
}

}  // namespace

Status ekfac_diagonal_update(View Lambda, View a, View delta, View U_A, View U_G, View mask, bool bias, Order order,
                             Precision, int threads) {
    bool wide = a.dtype == DType::f64 || delta.dtype == DType::f64 || (U_A.data && U_A.dtype == DType::f64) ||
                (U_G.data && U_G.dtype == DType::f64);
    if (wide) return update<double, double>(Lambda, a, delta, U_A, U_G, mask, bias, order, threads);
    if (Lambda.dtype == DType::f64)
        return update<float, double>(Lambda, a, delta, U_A, U_G, mask, bias, order, threads);
    return update<float, float>(Lambda, a, delta, U_A, U_G, mask, bias, order, threads);
}

}  // namespace IHVP_ISA
}  // namespace ihvp
