// S[m,n] = <g_m, g_n> = sum_{s,t} (delta1[m,s] . delta2[n,t]) (a1[m,s] . a2[n,t]): the tiles of both Gram matrices,
// multiplied and summed as they come. Queries of rank r are examples of r positions.
#include "engine.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

constexpr int64_t chunk_positions = 1024;  // of the second set

// A row of a tile of products, for columns of `positions` each from column `first` on: their sums are added to `out`.
template <class T>
IHVP_INLINE void add_segments(T* out, const T* products, int64_t first, int64_t count, int64_t positions) {
    if (positions == 1) {
        for (int64_t c = 0; c < count; ++c) out[first + c] += products[c];
        return;
    }
    int64_t n = first / positions, end = (n + 1) * positions - first;
    for (int64_t c = 0; c < count; ++n, end += positions) {
        T sum = 0;
        for (; c < least(end, count); ++c) sum += products[c];
        out[n] += sum;
    }
}

template <class T>
Status run(const View& out, const Rows& x1, const Rows& y1, int64_t positions1, const Rows& x2, const Rows& y2,
           int64_t positions2, int threads) {
    constexpr int64_t W = Panels<T>::width;
    int64_t I = x1.features, O = y1.features, M = x1.count / positions1, results = x2.count / positions2;
    int64_t depth = least(x2.count, chunk_positions), own = Left<T>::size(I + O, block_rows);
    Workspace space;
    space.plan<T>(Panels<T>::size(I, depth));
    space.plan<T>(Panels<T>::size(O, depth));
    space.plan<T>(threads * own);
    if (!space.allocate()) return Status::out_of_memory;
    T* memory_x = space.take<T>(Panels<T>::size(I, depth));
    T* memory_y = space.take<T>(Panels<T>::size(O, depth));
    T* scratch = space.take<T>(threads * own);
    T* result = static_cast<T*>(out.data);  // contiguous
    for (int64_t e = 0; e < M * results; ++e) result[e] = 0;
    int64_t group = most(1, least(block_rows / positions1, ceil_div(M, 4 * threads)));
    for (int64_t first = 0; first < x2.count; first += depth) {
        int64_t count = least(depth, x2.count - first);
        Panels<T> right_x{memory_x, I, count}, right_y{memory_y, O, count};
        pack_transposed(right_x, x2, first, threads);
        pack_transposed(right_y, y2, first, threads);
        parallel(threads, ceil_div(M, group), [&](int64_t task, int thread) {
            int64_t end = least(M, (task + 1) * group) * positions1;
            for (int64_t row = task * group * positions1; row < end; row += block_rows) {
                int64_t height = least(block_rows, end - row);
                Left<T> left_x{scratch + thread * own, I, height};
                Left<T> left_y{left_x.data + Left<T>::size(I, block_rows), O, height};
                for (int64_t u = 0; u < left_x.units(); ++u) {
                    pack_transposed(left_x, u, x1, row);
                    pack_transposed(left_y, u, y1, row);
                }
                for (int64_t p = 0; p < right_x.count(); ++p) {
                    for (int64_t i = 0; i < height; i += tile_rows) {
                        Tile<T> x = {}, y = {};
                        multiply(x, left_x, i, right_x, p, 0, I);
                        multiply(y, left_y, i, right_y, p, 0, O);
                        int rows = int(least(tile_rows, height - i));
                        for (int r = 0; r < rows; ++r) {
                            T products[W];
                            for (int v = 0; v < x.vectors; ++v)
                                store(products + v * Lanes<T>::width, x.acc[r][v] * y.acc[r][v]);
                            add_segments(result + (row + i + r) / positions1 * results, products, first + p * W,
                                         least(W, count - p * W), positions2);
                        }
                    }
                }
            }
        });
    }
    return Status::ok;
}

}  // namespace

Status ghost_dot(View out, View a1, View delta1, View a2, View delta2, View mask1, View mask2, bool bias1, bool bias2,
                 bool per_token, int threads) {
    return IHVP_COMPUTE(out.dtype == DType::f64, [&](auto zero) {
        return run<decltype(zero)>(out, token_rows(a1, mask1, bias1), token_rows(delta1, mask1, false), a1.shape[1],
                                   token_rows(a2, mask2, bias2), token_rows(delta2, mask2, false),
                                   per_token ? 1 : a2.shape[1], threads);
    });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
