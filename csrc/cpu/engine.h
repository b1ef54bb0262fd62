// The engine: one register tile and the products made of it. epilogue.h has what may follow it.
//
// Every product here is X^T Y for two operands that share their row index k:
//     tile[i, j] = sum_k X[k, i] Y[k, j]
// panels.h has how they are packed.
// The tile of a product comes out with its own rows in k order of the next product, so chained products
// (rotate, divide, rotate back) store straight into panels and never repack. What happens to a finished tile
// is a template argument, called as finish(tile, i, j): store, add, square and add, row dot.
#pragma once
#include "panels.h"

namespace ihvp {
namespace IHVP_ISA {
namespace {

// Two bfloat16 numbers, the first one below: bf16.h has products over such pairs.
using Pair = uint32_t;

// What products of T are summed in.
template <class T>
struct SumOf {
    using Type = T;
};
template <>
struct SumOf<Pair> {
    using Type = float;
};
template <class T>
using Sum = typename SumOf<T>::Type;

template <class T>
IHVP_INLINE void multiply_add(Vec<Sum<T>>& sum, Vec<T> y, T x) {
    sum += y * x;
}

template <class T>
struct Tile {
    Vec<T> acc[tile_rows][tile_vectors];
    int vectors = 0;  // in use: fewer in the last panel
};

// What the caller will read next, fetched into the L2 cache while a product runs: `stride` bytes on with each k, and
// `jump` further ones after each `period` of them.
struct Ahead {
    const char* data = nullptr;
    int64_t stride = 0, period = int64_t(1) << 60, jump = 0;
};

// Where a tile ends: in memory, its rows `stride` elements apart; with `more` it is added to what is there.
template <class T>
struct Into {
    T* data;
    int64_t stride;
    bool more = false;

    IHVP_INLINE Vec<T> first(int r, int v) const { return load(data + r * stride + v * Lanes<T>::width); }
    IHVP_INLINE void last(int r, int v, Vec<T> x) const { store(data + r * stride + v * Lanes<T>::width, x); }
};

template <class T, int vectors, int64_t next_k, class Target>
IHVP_INLINE void multiply(const Target& target, int64_t depth, const T* __restrict x, int64_t next_column,
                          const T* __restrict y, Ahead ahead) {
    constexpr int W = Lanes<T>::width, P = Lanes<T>::panel;
    // With nothing to come, what is here already: an address that is not mapped would be looked up each time.
    const char* next = ahead.data != nullptr ? ahead.data : reinterpret_cast<const char*>(y);
    Vec<Sum<T>> acc[tile_rows][vectors] = {};
    if (target.more) {
#pragma GCC unroll 16
        for (int r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) acc[r][v] = target.first(r, v);
        }
    }
    for (int64_t k = 0; k < depth; next += ahead.jump) {
        for (int64_t end = least(depth, k + ahead.period); k < end; ++k) {
            Vec<T> b[vectors];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) b[v] = load<T>(y + v * W);
#pragma GCC unroll 16
            for (int r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v) multiply_add<T>(acc[r][v], b[v], x[r * next_column]);
            }
            __builtin_prefetch(next, 0, 2);
            next += ahead.stride;
            x += next_k;
            y += P;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < tile_rows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) target.last(r, v, acc[r][v]);
    }
}

// The tile at rows i.. of X's columns and panel p of Y, without its `first` vectors, over the rows k0..k1 of both.
// Returns its vectors in use.
template <class T, class X, class Target>
IHVP_INLINE int multiply(const Target& target, const X& x, int64_t i, const Panels<T>& y, int64_t p, int64_t k0,
                         int64_t k1, Ahead ahead = {}, int64_t first = 0) {
    constexpr int64_t P = Lanes<T>::panel;
    const T* a = x.at(k0, i);
    const T* b = y.data + (p * y.depth + k0) * P + first * Lanes<T>::width;
    int64_t vectors = least(tile_vectors, ceil_div(y.columns - p * P, Lanes<T>::width)) - first;
    switch (vectors) {
        case 1:
            multiply<T, 1, X::next_k>(target, k1 - k0, a, x.next_column(), b, ahead);
            break;
#if IHVP_TILE_VECTORS > 2
        case 2:
            multiply<T, 2, X::next_k>(target, k1 - k0, a, x.next_column(), b, ahead);
            break;
#endif
#if IHVP_TILE_VECTORS > 3
        case 3:
            multiply<T, 3, X::next_k>(target, k1 - k0, a, x.next_column(), b, ahead);
            break;
#endif
        default:
            multiply<T, tile_vectors, X::next_k>(target, k1 - k0, a, x.next_column(), b, ahead);
    }
    return int(vectors);
}

// The same as a tile; `more` adds to it.
template <class T, class X>
IHVP_INLINE void multiply(Tile<Sum<T>>& tile, const X& x, int64_t i, const Panels<T>& y, int64_t p, int64_t k0,
                          int64_t k1, bool more = false, Ahead ahead = {}, int64_t first = 0) {
    Sum<T>* data = reinterpret_cast<Sum<T>*>(tile.acc);
    tile.vectors = multiply<T>(Into<Sum<T>>{data, Lanes<T>::panel, more}, x, i, y, p, k0, k1, ahead, first);
}

// Columns of X that a product keeps in the L2 cache, as many bytes for double as for float.
template <class T>
constexpr int64_t product_rows = block_rows * int64_t(sizeof(float)) / int64_t(sizeof(T));

// What follows a tile may ask for the memory it needs before the tile is computed: finish.fetch(i, j).
template <class Finish>
IHVP_INLINE auto fetch_for(const Finish& finish, int64_t i, int64_t j) -> decltype(finish.fetch(i, j)) {
    finish.fetch(i, j);
}
template <class... Others>
IHVP_INLINE void fetch_for(const Others&...) {}

// Or say what is fetched while a tile is computed over some rows of k, instead of the next panel: finish.ahead(rows).
template <class Finish>
IHVP_INLINE auto ahead_for(Ahead, const Finish& finish, int64_t rows) -> decltype(finish.ahead(rows)) {
    return finish.ahead(rows);
}
template <class... Others>
IHVP_INLINE Ahead ahead_for(Ahead usual, const Others&...) {
    return usual;
}

// Or take a tile from the registers where all that follows is to store it: finish.into(i, j), with no data elsewhere.
template <class T, class Finish>
IHVP_INLINE auto into_for(const Finish& finish, int64_t i, int64_t j) -> decltype(finish.into(i, j)) {
    return finish.into(i, j);
}
template <class T, class... Others>
IHVP_INLINE Into<Sum<T>> into_for(const Others&...) {
    return {nullptr, 0};
}

// Rows of k that a product takes at a time, and how often.
template <class T>
constexpr int64_t product_k = block_bytes / (Panels<T>::width * int64_t(sizeof(T)));
template <class T>
int64_t product_turns(int64_t depth) {
    return depth <= 2 * product_k<T> ? 1 : depth / product_k<T>;
}

// X^T Y for the columns i0..i1 of X and the panels p0..p1 of Y, all of k. What is multiplied at a time lies in the L2
// cache: product_rows columns of X, one panel of Y, product_k of k. Where k is longer, the tiles of a block of X by
// block_panels of Y wait for the next block of k.
template <class T, class X, class Finish>
IHVP_INLINE void product(const X& x, int64_t i0, int64_t i1, const Panels<T>& y, int64_t p0, int64_t p1,
                         const Finish& finish) {
    constexpr int64_t W = Panels<T>::width, block_k = product_k<T>;
    constexpr int64_t block_panels = 4, block_tiles = product_rows<T> / tile_rows;
    Tile<Sum<T>> waiting[block_panels * block_tiles];
    bool whole = product_turns<T>(x.depth) == 1;
    for (int64_t rows = i0; rows < i1; rows += product_rows<T>) {
        int64_t end = least(i1, rows + product_rows<T>);
        for (int64_t group = p0; group < p1; group += block_panels) {
            int64_t group_end = least(p1, group + block_panels), k = 0;
            do {
                int64_t k1 = whole || x.depth - k < 2 * block_k ? x.depth : k + block_k;
                for (int64_t p = group; p < group_end; ++p) {
                    const T* next = p + 1 < group_end ? y.at(k, (p + 1) * W)
                                    : k1 < x.depth    ? y.at(k1, group * W)
                                    : group_end < p1  ? y.at(0, group_end * W)
                                                      : y.at(k, p * W);
                    int64_t share = W * int64_t(sizeof(T)) * tile_rows / (end - rows);
                    Tile<Sum<T>>* tile = waiting + (whole ? 0 : (p - group) * block_tiles);
                    for (int64_t i = rows; i < end; i += tile_rows) {
                        int64_t done = (i - rows) / tile_rows * (k1 - k) * share;
                        if (k1 == x.depth) fetch_for(finish, i, p * W);
                        Ahead usual{reinterpret_cast<const char*>(next) + done, share};
                        Ahead ahead = ahead_for(usual, finish, k1 - k);
                        Into<Sum<T>> direct = into_for<T>(finish, i, p * W);
                        if (whole && direct.data != nullptr) {
                            multiply<T>(direct, x, i, y, p, 0, x.depth, ahead);
                            continue;
                        }
                        multiply<T>(*tile, x, i, y, p, k, k1, k > 0, ahead);
                        if (k1 == x.depth) finish(*tile, i, p * W);
                        tile += whole ? 0 : 1;
                    }
                }
                k = k1;
            } while (k < x.depth);
        }
    }
}

// All of X^T Y, parallel over blocks of X by groups of panels of Y.
template <class T, class X, class Finish>
void product(const X& x, const Panels<T>& y, int threads, const Finish& finish) {
    constexpr int64_t group = 4;
    int64_t blocks = ceil_div(x.columns, product_rows<T>), groups = ceil_div(y.count(), group);
    parallel(threads, blocks * groups, [&](int64_t task, int) {
        int64_t first = task / groups * product_rows<T>, end = least(x.columns, first + product_rows<T>);
        int64_t p0 = task % groups * group;
        product(x, first, end, y, p0, least(y.count(), p0 + group), finish);
    });
}

// Rows and columns of X^T X whose tiles on the diagonal are whole: squares of so many.
template <class T>
constexpr int64_t triangle_unit = tile_rows < Lanes<T>::width ? Lanes<T>::width : tile_rows;

// X^T X on and above its diagonal, parallel over panels by blocks of X, the longest of them first; all of k at a time.
// tile_of(i, p, ahead, first): the tile at rows i.. and panel p, without its `first` vectors.
template <class T, class TileOf, class Finish>
void product_triangle(const Panels<T>& x, int threads, const TileOf& tile_of, const Finish& finish) {
    constexpr int64_t W = Panels<T>::width, lanes = Lanes<T>::width, unit = triangle_unit<T>;
    constexpr int64_t rows = product_rows<T>, across = rows / W;
    static_assert(rows % W == 0 && W % unit == 0, "a block is a whole number of panels, a panel of squares");
    int64_t panels = x.count(), blocks = ceil_div(panels, across);
    int64_t tasks = blocks * panels - across * blocks * (blocks - 1) / 2;
    parallel(threads, tasks, [&](int64_t task, int) {
        int64_t block = 0;  // whose panels are those from its own on
        for (; task >= panels - block * across; ++block) task -= panels - block * across;
        int64_t p = panels - 1 - task, first = block * rows, end = least(least(x.columns, first + rows), (p + 1) * W);
        const char* next = reinterpret_cast<const char*>(x.at(0, (p > block * across ? p - 1 : panels - 1) * W));
        int64_t share = W * int64_t(sizeof(T)) * tile_rows / (end - first);
        for (int64_t i = first; i < end; i += tile_rows, next += x.depth * share) {
            int64_t skipped = most(0, i / unit * unit - p * W) / lanes, j = p * W + skipped * lanes;
            fetch_for(finish, i, j);
            finish(tile_of(i, p, Ahead{next, share}, skipped), i, j);
        }
    });
}

template <class T, class Finish>
void product_triangle(const Panels<T>& x, int threads, const Finish& finish) {
    auto tile_of = [&](int64_t i, int64_t p, Ahead ahead, int64_t first) {
        Tile<Sum<T>> tile;
        multiply<T>(tile, x, i, x, p, 0, x.depth, false, ahead, first);
        return tile;
    };
    product_triangle(x, threads, tile_of, finish);
}

// Packs columns from `column` on of a matrix while a product runs: before each of its tiles the rows that were fetched
// during the one before.
template <class T>
class PackMeanwhile {
  public:
    PackMeanwhile(const Panels<T>& out, const Rows& in, int64_t column, int64_t tiles)
        : out_(out), in_(in), column_(column), share_(ceil_div(out.depth, most(tiles, 1))) {
        if (lies_by_columns(in)) share_ = ceil_div(share_, Lanes<T>::width) * Lanes<T>::width;
    }
    Ahead next(int64_t depth) {
        pack_straight(out_, in_, 0, packed_, fetched_, column_);
        packed_ = fetched_;
        fetched_ = least(out_.depth, packed_ + share_);
        if (packed_ == fetched_ || out_.columns == 0) return {};
        bool by_columns = lies_by_columns(in_);
        Rows in = by_columns ? exchanged(in_, packed_) : in_;
        int64_t rows = fetched_ - packed_, size = element_size(in.dtype);
        int64_t across = by_columns ? out_.columns : rows, along = (by_columns ? rows : out_.columns) * size;
        int64_t period = most(1, depth / across), stride = ceil_div(along, period);
        const char* data = by_columns ? place(in, column_, 0) : place(in, packed_, column_);
        return {data, stride, period, in.stride_inner * size - stride * period};
    }
    void rest() {
        pack_straight(out_, in_, 0, packed_, out_.depth, column_);
        packed_ = fetched_ = out_.depth;
    }

  private:
    Panels<T> out_;
    const Rows& in_;
    int64_t column_, share_, packed_ = 0, fetched_ = 0;
};

// What follows the tiles of a product that begins at a row and a column of a larger one.
template <class T, class Finish>
struct Shifted {
    const Finish& finish;
    int64_t row, column;

    IHVP_INLINE void operator()(const Tile<T>& tile, int64_t i, int64_t j) const { finish(tile, row + i, column + j); }
    IHVP_INLINE void fetch(int64_t i, int64_t j) const { fetch_for(finish, row + i, column + j); }
    IHVP_INLINE Into<T> into(int64_t i, int64_t j) const { return into_for<T>(finish, row + i, column + j); }
};

// The same, the next panel being packed meanwhile.
template <class T, class Finish>
struct Meanwhile : Shifted<T, Finish> {
    PackMeanwhile<T>& packing;

    Ahead ahead(int64_t depth) const { return packing.next(depth); }
};

// X^T Y for the columns i0..i1 of X and c0..c1 of Y, whose panels are used once: each is packed while the one before it
// is multiplied. `memory` holds two of them.
template <class T, class X, class Finish>
void product_packing(const X& x, int64_t i0, int64_t i1, const Rows& y, int64_t c0, int64_t c1, T* memory,
                     const Finish& finish) {
    constexpr int64_t W = Panels<T>::width;
    int64_t tiles = ceil_div(i1 - i0, tile_rows) * product_turns<T>(x.depth), size = Panels<T>::size(x.depth, W);
    auto panel = [&](int64_t c) {
        return Panels<T>{memory + (c - c0) / W % 2 * size, x.depth, most(0, least(W, c1 - c))};
    };
    PackMeanwhile<T>(panel(c0), y, c0, 1).rest();
    for (int64_t c = c0; c < c1; c += W) {
        PackMeanwhile<T> packing(panel(c + W), y, c + W, tiles);
        product(x, i0, i1, panel(c), 0, 1, Meanwhile<T, Finish>{{finish, 0, c}, packing});
        packing.rest();
    }
}

// Examples of T positions each whose tokens fit a budget: enough to keep the tiles busy, not so many that the
// workspace follows N, and about as many in every chunk.
IHVP_INLINE int64_t chunk_of_examples(int64_t N, int64_t T, int64_t positions) {
    int64_t fitting = most(1, least(N, positions / most(T, 1)));
    return most(1, ceil_div(N, ceil_div(most(N, 1), fitting)));
}

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp

// Runs f(zero of the compute type): double when any operand is double.
#define IHVP_COMPUTE(is_double, f) ((is_double) ? f(double(0)) : f(float(0)))
