// What follows a tile of a product: it becomes part of packed panels, or of a matrix of any strides.
#pragma once
#include "engine.h"

namespace ihvp {
namespace IHVP_ISA {
namespace {

// Tile rows i.. become rows k of `out`. Rows past the end of X are dropped, columns past the end are zero.
template <class T, bool square, int64_t W = Panels<T>::width>
struct StorePanels {
    Panels<T, W> out;
    IHVP_INLINE void operator()(const Tile<T>& tile, int64_t i, int64_t j) const {
        int rows = int(least(tile_rows, out.depth - i));
        for (int r = 0; r < rows; ++r) {
            for (int v = 0; v < tile_vectors; ++v) {
                Vec<T> x = v < tile.vectors ? tile.acc[r][v] : Vec<T>{};
                out.put(i + r, j + v * Lanes<T>::width, square ? x * x : x);
            }
        }
    }
};

// out[i, j] (= or +=) tile, for a matrix of any strides, float or double.
template <class T, class S, bool add>
struct StoreMatrix {
    S* out;
    int64_t rows, columns, stride_row, stride_column;
    static constexpr int lanes = Lanes<T>::width;

    IHVP_INLINE void operator()(const Tile<T>& tile, int64_t i, int64_t j) const {
        int height = int(least(tile_rows, rows - i));
        if (stride_row == 1 && stride_column != 1 && height == tile_rows) return by_columns(tile, i, j);
        for (int r = 0; r < height; ++r) {
            for (int v = 0; v < tile.vectors; ++v) {
                int64_t column = j + v * lanes, left = columns - column;
                S* at = out + (i + r) * stride_row + column * stride_column;
                if (stride_column == 1 && left >= lanes) {
                    put(at, tile.acc[r][v]);
                } else {
                    T spilled[lanes];
                    store(spilled, tile.acc[r][v]);
                    for (int64_t c = 0; c < least(lanes, left); ++c) put(at[c * stride_column], spilled[c]);
                }
            }
        }
    }
    // The columns of a tile are what lies together.
    IHVP_INLINE void by_columns(const Tile<T>& tile, int64_t i, int64_t j) const {
        constexpr int together = tile_rows < lanes ? tile_rows : lanes;
        for (int v = 0; v < tile.vectors; ++v) {
            int64_t column = j + v * lanes, count = least(lanes, columns - column);
            for (int first = 0; first < tile_rows; first += together) {
                Vec<T> square[lanes] = {};
                for (int r = 0; r < together; ++r) square[r] = tile.acc[first + r][v];
                transpose<T>(square);
                for (int64_t c = 0; c < count; ++c) {
                    T spilled[lanes];
                    store(spilled, square[c]);
                    S* at = out + i + first + (column + c) * stride_column;
                    for (int r = 0; r < together; ++r) put(at[r], spilled[r]);
                }
            }
        }
    }
    // Where a tile of whole rows and vectors goes as it is.
    IHVP_INLINE Into<T> into(int64_t i, int64_t j) const {
        if constexpr (sizeof(S) == sizeof(T) && !add) {
            int64_t left = columns - j;
            bool whole = rows - i >= tile_rows && (left >= Panels<T>::width || left % lanes == 0);
            if (whole && stride_column == 1) return {out + i * stride_row + j, stride_row};
        }
        return {nullptr, 0};
    }
    // Asks for what a tile will be added to, while the tile is computed.
    IHVP_INLINE void fetch(int64_t i, int64_t j) const {
        if (!add) return;
        int64_t height = least(tile_rows, rows - i), width = least(Panels<T>::width, columns - j);
        int64_t along = stride_column == 1 ? width : height, across = stride_column == 1 ? height : width;
        int64_t stride = stride_column == 1 ? stride_row : stride_column;
        const S* at = out + i * stride_row + j * stride_column;
        for (int64_t r = 0; r < across; ++r, at += stride) {
            for (int64_t c = 0; c < along; c += 64 / int64_t(sizeof(S))) __builtin_prefetch(at + c, 1, 2);
            __builtin_prefetch(at + along - 1, 1, 2);
        }
    }
    IHVP_INLINE static void put(S& at, T value) { at = add ? S(at + S(value)) : S(value); }
    IHVP_INLINE static void put(S* at, Vec<T> value) {
        if constexpr (sizeof(S) == sizeof(T)) {
            store(at, add ? load(at) + value : value);
        } else {
            T spilled[lanes];
            store(spilled, value);
            for (int c = 0; c < lanes; ++c) put(at[c], spilled[c]);
        }
    }
};

template <class T, class S, bool add>
StoreMatrix<T, S, add> matrix_target(const View& m) {
    int r = m.dims - 2;
    return {static_cast<S*>(m.data), m.shape[r], m.shape[r + 1], m.stride[r], m.stride[r + 1]};
}

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp
