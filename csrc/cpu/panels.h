// The operands of a product as they are packed: panels of PANEL columns, panel p holding rows 0..depth contiguously,
//     X[k, p * PANEL + c] = data[(p * depth + k) * PANEL + c],   columns past the end are zero.
// An operand that is X alone may be packed by tiles instead, PANEL being tile_rows (Left), or read where it lies
// (Lying).
#pragma once
#include "resources.h"
#include "rows.h"

namespace ihvp {
namespace IHVP_ISA {
namespace {

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
        int64_t count = least(block, out.columns - c0), begin = first_column + c0;
        int64_t lying = most(0, least(count, in.stored - begin));  // all but the bias feature
        for (int64_t k = k0; k < k1; ++k) {
            const T* row = lying_piece<T>(in, first_row + k, begin, begin + lying);
            int64_t there = row != nullptr ? lying : count, whole = there / W * W;
            if (row == nullptr) {
                in.read(buffer, first_row + k, begin, begin + count);
                row = buffer;
            }
            T* to = out.at(k, c0);
            for (int64_t c = 0; c < whole; c += W, to += out.depth * W) std::memcpy(to, row + c, W * sizeof(T));
            for (int64_t c = whole; c < there; ++c) *to++ = row[c];
            for (int64_t c = there; c < count; ++c) *to++ = 1;
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

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp
