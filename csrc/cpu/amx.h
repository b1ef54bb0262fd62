// bfloat16 tile products: what AMX adds to AVX-512. A tile is 16 rows of 64 bytes, and one product is
//     sums[i, j] += sum_k left[i, k] right[k, j]     for 16 x 16 sums and k = 0..31, products exact, sums in float32
// with `right` in pairs: its row r holds k = 2 r and 2 r + 1 of each column, side by side. Taken as 32-bit words, a
// left tile is the transpose of a right one. Denormals count as zero.
// Without AMX this is the engine alone.
#pragma once
#include "bf16.h"

#ifdef __AMX_BF16__
#include <immintrin.h>

namespace ihvp {
namespace IHVP_ISA {
namespace {

constexpr int64_t step = 32;            // k of one tile product
constexpr int64_t tile_elements = 512;  // bfloat16 numbers of a tile
constexpr int64_t tile_block = 32;      // columns that a block of two tiles side by side holds

struct __attribute__((packed)) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Not a local: gcc's header tells the compiler of its first eight bytes only, and the rest could stay unwritten.
constexpr TileConfig tile_config;

// Tiles are loaded past the prefetchers: what comes next is asked for while this is multiplied.
IHVP_INLINE void fetch_tile(const void* tile) {
#pragma GCC unroll 16
    for (int line = 0; line < 16; ++line) __builtin_prefetch(static_cast<const char*>(tile) + line * 64, 0, 3);
}

// The sums of 32 x 32 in tiles 0 to 3, row halves outer: zero, or what `sums` holds as four tiles.
IHVP_INLINE void begin_sums(bool zero, const void* sums) {
    const char* tiles = static_cast<const char*>(sums);
    if (zero) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, tiles, 64);
        _tile_loadd(1, tiles + 1024, 64);
        _tile_loadd(2, tiles + 2048, 64);
        _tile_loadd(3, tiles + 3072, 64);
    }
}

IHVP_INLINE void end_sums(void* sums) {
    char* tiles = static_cast<char*>(sums);
    _tile_stored(0, tiles, 64);
    _tile_stored(1, tiles + 1024, 64);
    _tile_stored(2, tiles + 2048, 64);
    _tile_stored(3, tiles + 3072, 64);
}

// Tokens as tiles: for each block of 32 columns and each step of 32 positions two tiles.
struct TokenTiles {
    uint16_t* data;
    int64_t blocks, steps;
    uint16_t* at(int64_t block, int64_t s) const { return data + (block * steps + s) * 2 * tile_elements; }
};

// One step as right tiles: the columns from first_column on of the positions first.., at most 32; missing ones are
// zero.
inline void pack_right(const TokenTiles& out, int64_t s, const Rows& x, int64_t first, int64_t count,
                       int64_t first_column = 0) {
    uint16_t order[2][32];
    for (int c = 0; c < 32; ++c) {
        order[0][c] = uint16_t(c / 2 + c % 2 * 32);
        order[1][c] = uint16_t(16 + c / 2 + c % 2 * 32);
    }
    __m512i low = _mm512_loadu_si512(order[0]), high = _mm512_loadu_si512(order[1]);
    for (int64_t r = 0; r < step / 2; ++r) {
        for (int64_t block = 0; block < out.blocks; ++block) {
            int64_t k = 2 * r, c0 = first_column + block * tile_block;
            __m512i even = k < count ? token_bits(x, first + k, c0) : _mm512_setzero_si512();
            __m512i odd = k + 1 < count ? token_bits(x, first + k + 1, c0) : _mm512_setzero_si512();
            uint16_t* to = out.at(block, s) + r * 32;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(to + tile_elements, _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

// The left tiles of what `right` holds in `tiles` tiles.
inline void left_from_right(uint16_t* left, const uint16_t* right, int64_t tiles) {
    for (int64_t t = 0; t < tiles; ++t, left += tile_elements, right += tile_elements) {
        Vec<float> square[16];
        for (int r = 0; r < 16; ++r) square[r] = load(reinterpret_cast<const float*>(right + r * 32));
        transpose<float>(square);
        for (int r = 0; r < 16; ++r) store(reinterpret_cast<float*>(left + r * 32), square[r]);
    }
}

// sums (32 x 32, rows of 32) = left^T right over `steps` steps of both, handed over as tiles of the engine.
template <class Finish>
IHVP_INLINE void multiply_blocks(const uint16_t* left, int64_t i, const uint16_t* right, int64_t j, int64_t steps,
                                 const Finish& finish) {
    for (int64_t r = 0; r < tile_block; r += tile_rows) fetch_for(finish, i + r, j);
    begin_sums(true, nullptr);
    for (int64_t s = 0; s < steps; ++s, left += 2 * tile_elements, right += 2 * tile_elements) {
        _tile_loadd(4, left, 64);
        _tile_loadd(5, left + tile_elements, 64);
        _tile_loadd(6, right, 64);
        _tile_loadd(7, right + tile_elements, 64);
        _tile_dpbf16ps(0, 4, 6);
        fetch_tile(right + 2 * tile_elements);
        _tile_dpbf16ps(1, 4, 7);
        fetch_tile(left + 2 * tile_elements);
        _tile_dpbf16ps(2, 5, 6);
        fetch_tile(right + 3 * tile_elements);
        _tile_dpbf16ps(3, 5, 7);
        fetch_tile(left + 3 * tile_elements);
    }
    alignas(64) float sums[tile_block * tile_block];
    _tile_stored(0, sums, 4 * tile_block);
    _tile_stored(1, sums + 16, 4 * tile_block);
    _tile_stored(2, sums + 16 * tile_block, 4 * tile_block);
    _tile_stored(3, sums + 16 * tile_block + 16, 4 * tile_block);
    for (int64_t r = 0; r < tile_block; r += tile_rows) {
        Tile<float> tile;
        tile.vectors = 2;
        for (int e = 0; e < tile_rows; ++e) {
            for (int v = 0; v < 2; ++v) tile.acc[e][v] = load(sums + (r + e) * tile_block + v * 16);
        }
        finish(tile, i + r, j);
    }
}

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp
#endif
