// out[n] = sum_oi (U_G^T g_n U_A)[o,i]^2 / (Lambda + damping)[o,i].
// T = 1: with W = 1 / (Lambda + damping), rowsum((D^2 W) * A^2) over projected, squared tokens.
// T > 1: the tiles of each example's rotated gradient, squared and weighed as they come.
#include "eigenbasis.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

constexpr int64_t chunk_positions = 768;
constexpr int64_t most_rows = 96;  // examples of a task at T = 1: a panel of the weight serves them all

// W with k = o, its padding zero: rows as well, up to `depth`.
template <class T>
Panels<T> pack_weight(T* memory, const View& Lambda, double damping, int64_t depth, int threads) {
    constexpr int64_t W = Panels<T>::width;
    int64_t rows = Lambda.shape[0];
    Panels<T> weight{memory, depth, Lambda.shape[1]};
    parallel(threads, weight.count(), [&](int64_t p, int) {
        Panels<T> panel{weight.at(0, p * W), depth, least(W, weight.columns - p * W)};
        pack_straight(panel, matrix_rows(Lambda), 0, 0, rows, p * W);
        for (int64_t k = 0; k < rows; ++k) {
            T* row = panel.at(k, 0);
            for (int64_t c = 0; c < panel.columns; ++c) row[c] = T(1) / (row[c] + T(damping));
        }
        std::memset(panel.at(rows, 0), 0, size_t((depth - rows) * W) * sizeof(T));
    });
    return weight;
}

// The tile's squares by their weights, added to a sum.
template <class T>
struct IntoWeighted {
    Tile<T>& sum;
    const T* weight;
    static constexpr bool more = false;

    IHVP_INLINE Vec<T> first(int, int) const { return Vec<T>{}; }
    IHVP_INLINE void last(int r, int v, Vec<T> x) const {
        sum.acc[r][v] += x * x * load(weight + r * Panels<T>::width + v * Lanes<T>::width);
    }
};

template <class T>
Status run(const View& out, const Rows& a, const Rows& delta, int64_t N, int64_t positions, const View& U_A,
           const View& U_G, const View& Lambda, double damping, int threads) {
    constexpr int64_t W = Panels<T>::width;
    int64_t I = a.features, O = delta.features;
    bool single = positions == 1;
    int64_t examples = chunk_of_examples(N, positions, chunk_positions), depth = examples * positions;
    int64_t size_d = single ? Left<T>::size(O, depth) : Left<T>::size(depth, O);
    int64_t depth_weight = single ? O : ceil_div(O, tile_rows) * tile_rows;  // whole tiles of them
    Workspace space;
    int64_t uses_A = N * positions, uses_G = single ? many_positions : N * positions;
    int64_t size_scratch = most(scratch_size<T>(I, uses_A, threads), scratch_size<T>(O, uses_G, threads));
    space.plan<T>(basis_size<T>(U_A, I, uses_A));
    space.plan<T>(basis_size<T>(U_G, O, uses_G));
    space.plan<T>(Panels<T>::size(depth_weight, I));
    space.plan<T>(Panels<T>::size(depth, I));
    space.plan<T>(size_d);
    space.plan<T>(size_scratch);
    if (!space.allocate()) return Status::out_of_memory;
    Basis<T> basis_A = take_basis<T>(space, U_A, I, uses_A, threads);
    Basis<T> basis_G = take_basis<T>(space, U_G, O, uses_G, threads);
    Panels<T> weight =
        pack_weight<T>(space.take<T>(Panels<T>::size(depth_weight, I)), Lambda, damping, depth_weight, threads);
    Panels<T> x{space.take<T>(Panels<T>::size(depth, I)), depth, I};
    T* memory_d = space.take<T>(size_d);
    T* scratch = space.take<T>(size_scratch);
    T* result = static_cast<T*>(out.data);
    for (int64_t first = 0; first < N; first += examples) {
        int64_t count = least(examples, N - first);
        x.depth = count * positions;
        if (single) {
            Left<T> d{memory_d, O, count};
            project<T, true>(x, a, first, basis_A, scratch, threads);
            project_features<T, true>(d, delta, first, basis_G, scratch, threads);
            int64_t share = ceil_div(ceil_div(count, 2 * threads), tile_rows) * tile_rows,
                    own = least(most_rows, share);
            parallel(threads, ceil_div(count, own), [&](int64_t block, int) {
                int64_t i0 = block * own, i1 = least(count, i0 + own);
                Vec<T> sums[most_rows] = {};
                product(d, i0, i1, weight, 0, weight.count(), [&](const Tile<T>& tile, int64_t i, int64_t j) {
                    for (int64_t n = i; n < least(i1, i + tile_rows); ++n) {
                        const T* squares = x.at(n, j);
                        for (int v = 0; v < tile.vectors; ++v)
                            sums[n - i0] += tile.acc[n - i][v] * load(squares + v * Lanes<T>::width);
                    }
                });
                for (int64_t n = i0; n < i1; ++n) result[(first + n) * out.stride[0]] = sum_lanes<T>(sums[n - i0]);
            });
        } else {
            Left<T> d{memory_d, count * positions, O};
            project<T, false>(x, a, first * positions, basis_A, scratch, threads);
            project<T, false>(d, delta, first * positions, basis_G, scratch, threads);
            parallel(threads, count, [&](int64_t n, int) {
                T total = 0;
                for (int64_t p = 0; p < x.count(); ++p) {
                    Tile<T> sum = {};
                    for (int64_t i = 0; i < O; i += tile_rows) {
                        IntoWeighted<T> squares{sum, weight.at(i, p * W)};
                        multiply<T>(squares, d, i, x, p, n * positions, (n + 1) * positions);
                    }
                    for (int r = 1; r < tile_rows; ++r) {
                        for (int v = 0; v < tile_vectors; ++v) sum.acc[0][v] += sum.acc[r][v];
                    }
                    for (int v = 0; v < tile_vectors; ++v) total += sum_lanes<T>(sum.acc[0][v]);
                }
                result[(first + n) * out.stride[0]] = total;
            });
        }
    }
    return Status::ok;
}

}  // namespace

Status ekfac_self_influence(View out, View a, View delta, View U_A, View U_G, View Lambda, double damping, View mask,
                            bool bias, int threads) {
    return IHVP_COMPUTE(out.dtype == DType::f64, [&](auto zero) {
        return run<decltype(zero)>(out, token_rows(a, mask, bias), token_rows(delta, mask, false), a.shape[0],
                                   a.shape[1], U_A, U_G, Lambda, damping, threads);
    });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
