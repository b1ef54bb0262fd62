// out[n] = ||g_n||^2 = sum_{s,t} (delta[n,s] . delta[n,t]) (a[n,s] . a[n,t]): both Gram matrices are symmetric, so the
// blocks above their diagonals count twice. At T = 1 it is ||a||^2 ||delta||^2.
#include "engine.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

template <class T>
T square(const Rows& rows, int64_t row) {
    constexpr int lanes = Lanes<T>::width;
    constexpr int64_t block = 1024;
    T buffer[block];
    Vec<T> sum = {};
    for (int64_t c0 = 0; c0 < rows.features; c0 += block) {
        int64_t count = least(block, rows.features - c0);
        rows.read(buffer, row, c0, c0 + count);
        for (int64_t c = count; c % lanes != 0; ++c) buffer[c] = 0;
        for (int64_t c = 0; c < count; c += lanes) sum += load(buffer + c) * load(buffer + c);
    }
    return sum_lanes<T>(sum);
}

// Positions first.. of an example, ready for products over their features.
template <class T>
struct Packed {
    Panels<T> x, y;
    void pack(const Rows& a, const Rows& delta, int64_t first, int64_t count) {
        x.columns = y.columns = count;
        for (int64_t p = 0; p < x.count(); ++p) {
            pack_transposed(x, p, a, first);
            pack_transposed(y, p, delta, first);
        }
    }
};

template <class T>
Vec<T> dot(const Packed<T>& left, const Packed<T>& right, bool same) {
    constexpr int64_t W = Panels<T>::width;
    Vec<T> total = {};
    for (int64_t p = 0; p < right.x.count(); ++p) {
        int64_t end = same ? least(left.x.columns, (p + 1) * W) : left.x.columns;
        for (int64_t i = 0; i < end; i += tile_rows) {
            Tile<T> x = {}, y = {};
            multiply(x, left.x, i, right.x, p, 0, left.x.depth);
            multiply(y, left.y, i, right.y, p, 0, left.y.depth);
            Vec<T> sum = {};
            int rows = int(least(tile_rows, left.x.columns - i));
            for (int r = 0; r < rows; ++r) {
                for (int v = 0; v < x.vectors; ++v) sum += x.acc[r][v] * y.acc[r][v];  // padding columns are zero
            }
            total += same && i / W == p ? sum : sum + sum;
        }
    }
    return total;
}

template <class T>
Status run(const View& out, const Rows& a, const Rows& delta, int64_t N, int64_t positions, int threads) {
    int64_t I = a.features, O = delta.features, block = least(positions, block_rows);
    int64_t size = Panels<T>::size(I + O, block);
    Workspace space;
    space.plan<T>(threads * 2 * size);
    if (!space.allocate()) return Status::out_of_memory;
    T* scratch = space.take<T>(threads * 2 * size);
    T* result = static_cast<T*>(out.data);
    parallel(threads, N, [&](int64_t n, int thread) {
        T& target = result[n * out.stride[0]];
        if (positions == 1) {
            target = square<T>(a, n) * square<T>(delta, n);
            return;
        }
        T* memory = scratch + thread * 2 * size;
        T* middle = memory + Panels<T>::size(I, block);
        Packed<T> left{{memory, I, block}, {middle, O, block}};
        Packed<T> right{{memory + size, I, block}, {middle + size, O, block}};
        Vec<T> total = {};
        for (int64_t s = 0; s < positions; s += block) {
            left.pack(a, delta, n * positions + s, least(block, positions - s));
            total += dot(left, left, true);
            for (int64_t t = s + block; t < positions; t += block) {
                right.pack(a, delta, n * positions + t, least(block, positions - t));
                total += dot(left, right, false);
            }
        }
        target = sum_lanes<T>(total);
    });
    return Status::ok;
}

}  // namespace

Status ghost_norm(View out, View a, View delta, View mask, bool bias, int threads) {
    return IHVP_COMPUTE(out.dtype == DType::f64, [&](auto zero) {
        return run<decltype(zero)>(out, token_rows(a, mask, bias), token_rows(delta, mask, false), a.shape[0],
                                   a.shape[1], threads);
    });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
