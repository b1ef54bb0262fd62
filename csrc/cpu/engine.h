// The engine: packed panels and one register tile. epilogue.h has what may follow it.
//
// Every product here is X^T Y for two operands that share their row index k:
//     tile[i, j] = sum_k X[k, i] Y[k, j]
// An operand is packed into panels of PANEL columns, panel p holding rows 0..depth contiguously:
//     X[k, p * PANEL + c] = data[(p * depth + k) * PANEL + c],   columns past the end are zero.
// An operand that is X alone may be packed by tiles instead, PANEL being tile_rows (Left), or read where it lies
// (Lying).
// The tile of a product comes out with its own rows in k order of the next product, so chained products
// (rotate, divide, rotate back) store straight into panels and never repack. What happens to a finished tile
// is a template argument, called as finish(tile, i, j): store, add, square and add, row dot.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

#include "../workspace.h"
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
        base = static_cast<char*>(borrow_memory(size));
        return base != nullptr;
    }
    template <class T>
    T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(base + used);
        used += (size_t(count) * sizeof(T) + 63) / 64 * 64;
        return p;
    }
    ~Workspace() { return_memory(base); }
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

template <class T, int64_t panel = Lanes<T>::panel>
struct Panels {
    T* data;
    int64_t depth, columns;
    static constexpr int64_t width = panel;
    static constexpr int64_t unit = panel < Lanes<T>::width ? Lanes<T>::width : panel;  // columns packed at a time

    int64_t count() const { return ceil_div(columns, width); }
    int64_t units() const { return ceil_div(columns, unit); }
    T* at(int64_t row, int64_t column) const { return data + (column / width * depth + row) * width + column % width; }
    static constexpr int64_t next_k = width;  // within a tile
    static constexpr int64_t next_column() { return 1; }
    static int64_t size(int64_t depth, int64_t columns) { return ceil_div(columns, width) * width * depth; }

    // A vector of a row from `column` on, which begins a vector of the row; what lies past the last panel is dropped.
    IHVP_INLINE void put(int64_t row, int64_t column, Vec<T> x) const {
        constexpr int lanes = Lanes<T>::width;
        if constexpr (width >= lanes) {
            if (width >= Lanes<T>::panel || column < count() * width) store(at(row, column), x);
        } else {
            T values[lanes];
            store(values, x);
            for (int64_t c = 0; c < lanes && column + c < count() * width; c += width)
                std::memcpy(at(row, column + c), values + c, width * sizeof(T));
        }
    }
};

// X where it is no Y as well: the columns of a tile lie together, and what a tile reads is all its own.
template <class T>
using Left = Panels<T, tile_rows>;

// Rows of the source become columns of the panels: here the columns of one unit and the rows k0..k1. They are taken
// a square of lanes at a time, from the source as it lies or through a buffer.
template <class T, int64_t W>
void pack_transposed(const Panels<T, W>& out, int64_t u, const Rows& in, int64_t first_row, int64_t k0, int64_t k1) {
    constexpr int64_t unit = Panels<T, W>::unit, block = 128;
    constexpr int lanes = Lanes<T>::width;
    T buffer[lanes * block];
    for (int64_t c0 = u * unit; c0 < (u + 1) * unit; c0 += lanes) {
        int64_t count = most(0, least(lanes, out.columns - c0));
        const T* source[lanes] = {};
        for (int64_t c = 0; c < count; ++c) source[c] = lying_row<T>(in, first_row + c0 + c);
        int64_t direct = count > 0 && source[0] != nullptr ? (k1 - k0) / lanes * lanes : 0, k = k0;
        auto take = [&](int64_t offset, int64_t rows) {
            Vec<T> square[lanes];
            for (int64_t c = 0; c < lanes; ++c) square[c] = c < count ? load(source[c] + offset) : Vec<T>{};
            transpose<T>(square);
            for (int64_t r = 0; r < rows; ++r) out.put(k + r, c0, square[r]);
            k += rows;
        };
        while (k < k0 + direct) take(k, lanes);
        while (k < k1) {
            int64_t depth = least(block, k1 - k);
            for (int64_t c = 0; c < count; ++c) {
                in.read(buffer + c * block, first_row + c0 + c, k, k + depth);
                source[c] = buffer + c * block;
            }
            for (int64_t e = 0; e < depth; e += lanes) take(e, least(lanes, depth - e));
        }
    }
}

// Rows of the source become rows k of the panels: here rows k0..k1 from a column on, read whole so that each is found
// once.
template <class T, int64_t W>
void pack_straight(const Panels<T, W>& out, const Rows& in, int64_t first_row, int64_t k0, int64_t k1,
                   int64_t first_column = 0) {
    constexpr int64_t block = 1024 / W * W;
    if (lies_by_columns(in)) {
        Rows columns = exchanged(in, first_row);
        for (int64_t u = 0; u < out.units(); ++u) pack_transposed(out, u, columns, first_column, k0, k1);
        return;
    }
    T buffer[block];
    for (int64_t c0 = 0; c0 < out.columns; c0 += block) {
        int64_t count = least(block, out.columns - c0), whole = count / W * W, begin = first_column + c0;
        for (int64_t k = k0; k < k1; ++k) {
            const T* row = lying_piece<T>(in, first_row + k, begin, begin + count);
            if (row == nullptr) {
                in.read(buffer, first_row + k, begin, begin + count);
                row = buffer;
            }
            T* to = out.at(k, c0);
            for (int64_t c = 0; c < whole; c += W, to += out.depth * W) std::memcpy(to, row + c, W * sizeof(T));
            for (int64_t c = whole; c < count; ++c) *to++ = row[c];
            for (int64_t c = count; c % W != 0; ++c) *to++ = 0;
        }
    }
}

template <class T, int64_t W>
void pack_transposed(const Panels<T, W>& out, int64_t u, const Rows& in, int64_t first_row) {
    constexpr int64_t unit = Panels<T, W>::unit;
    if (lies_by_columns(in)) {
        Panels<T, W> own{out.at(0, u * unit), out.depth, least(unit, out.columns - u * unit)};
        Rows straight = exchanged(in, first_row + u * unit);
        return pack_straight(own, straight, 0, 0, out.depth);
    }
    pack_transposed(out, u, in, first_row, 0, out.depth);
}

template <class T, int64_t W>
void pack_straight(const Panels<T, W>& out, const Rows& in, int64_t first_row, int threads) {
    constexpr int64_t rows = 64;  // a task: enough to be worth handing out
    parallel(threads, ceil_div(out.depth, rows), [&](int64_t block, int) {
        pack_straight(out, in, first_row, block * rows, least(out.depth, (block + 1) * rows));
    });
}

template <class T, int64_t W>
void pack_transposed(const Panels<T, W>& out, const Rows& in, int64_t first_row, int threads) {
    parallel(threads, out.units(), [&](int64_t u, int) { pack_transposed(out, u, in, first_row); });
}

// Rows of the source as columns of X, from where they lie: whole tiles of them.
template <class T>
struct Lying {
    const T* data;
    int64_t stride, depth, columns;

    const T* at(int64_t k, int64_t column) const { return data + column * stride + k; }
    static constexpr int64_t next_k = 1;
    int64_t next_column() const { return stride; }
};

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

// The tile's squares, added to a sum.
template <class T>
struct IntoSquares {
    Tile<T>& sum;
    static constexpr bool more = false;

    IHVP_INLINE Vec<T> first(int, int) const { return Vec<T>{}; }
    IHVP_INLINE void last(int r, int v, Vec<T> x) const { sum.acc[r][v] += x * x; }
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

// The tile at rows i.. of X's columns and panel p of Y, over the rows k0..k1 of both. Returns its vectors in use.
template <class T, class X, class Target>
IHVP_INLINE int multiply(const Target& target, const X& x, int64_t i, const Panels<T>& y, int64_t p, int64_t k0,
                         int64_t k1, Ahead ahead = {}) {
    constexpr int64_t P = Lanes<T>::panel;
    const T* a = x.at(k0, i);
    const T* b = y.data + (p * y.depth + k0) * P;
    int64_t vectors = least(tile_vectors, ceil_div(y.columns - p * P, Lanes<T>::width));
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
                          int64_t k1, bool more = false, Ahead ahead = {}) {
    Sum<T>* data = reinterpret_cast<Sum<T>*>(tile.acc);
    tile.vectors = multiply<T>(Into<Sum<T>>{data, Lanes<T>::panel, more}, x, i, y, p, k0, k1, ahead);
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

// All of X^T Y, or the tiles on and above its diagonal, parallel over blocks of X by groups of panels of Y.
template <class T, bool upper, class X, class Finish>
void product(const X& x, const Panels<T>& y, int threads, const Finish& finish) {
    constexpr int64_t W = Panels<T>::width, group = 4;
    int64_t blocks = ceil_div(x.columns, product_rows<T>), groups = ceil_div(y.count(), group);
    parallel(threads, blocks * groups, [&](int64_t task, int) {
        int64_t first = task / groups * product_rows<T>, end = least(x.columns, first + product_rows<T>);
        int64_t p0 = task % groups * group, p1 = least(y.count(), p0 + group);
        if (!upper || end <= p0 * W) {
            product(x, first, end, y, p0, p1, finish);
        } else {
            for (int64_t p = p0; p < p1; ++p) product(x, first, least(end, (p + 1) * W), y, p, p + 1, finish);
        }
    });
}

// Packs rows of a matrix while a product runs: before each of its tiles the rows that were fetched during the one
// before.
template <class T>
class PackMeanwhile {
  public:
    PackMeanwhile(const Panels<T>& out, const Rows& in, int64_t column, int64_t tiles)
        : out_(out), in_(in), column_(column), share_(ceil_div(out.depth, most(tiles, 1))) {}
    Ahead next(int64_t depth) {
        pack_straight(out_, in_, 0, packed_, fetched_, column_);
        packed_ = fetched_;
        fetched_ = least(out_.depth, packed_ + share_);
        if (packed_ == fetched_) return {};
        int64_t size = element_size(in_.dtype), period = most(1, depth / (fetched_ - packed_));
        int64_t stride = ceil_div(out_.columns * size, period);
        return {place(in_, packed_, column_), stride, period, in_.stride_inner * size - stride * period};
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
