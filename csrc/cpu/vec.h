// The small vector type that every kernel is written over, and the shape of the register tile.
//
// CMake compiles each kernel file once per instruction set, with IHVP_ISA (the namespace and the name),
// IHVP_VECTOR_BYTES, IHVP_TILE_ROWS and IHVP_TILE_VECTORS set. The tile of TILE_ROWS x TILE_VECTORS vectors
// and its operands fill the register file; PANEL is a multiple of TILE_ROWS for float and double alike.
// Everything sits in an unnamed namespace: a symbol shared between instruction sets could be linked into
// the wrong one.
#pragma once
#include <cstdint>

#include "../kernels.h"

#define IHVP_INLINE inline __attribute__((always_inline))

namespace ihvp {
namespace IHVP_ISA {
namespace {

constexpr int tile_rows = IHVP_TILE_ROWS;
constexpr int tile_vectors = IHVP_TILE_VECTORS;
constexpr int64_t block_bytes = 96 << 10;  // of a panel: with block_rows of the other operand in an L2 cache of 1 MB
constexpr int64_t block_rows = 192;

template <class T>
struct Lanes {
    static constexpr int width = IHVP_VECTOR_BYTES / int(sizeof(T));
    static constexpr int panel = width * tile_vectors;  // columns of a packed panel
    static_assert(panel % tile_rows == 0, "a panel must hold whole register tiles");
    typedef T Vec __attribute__((vector_size(IHVP_VECTOR_BYTES)));
    typedef T Unaligned __attribute__((vector_size(IHVP_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

template <class T>
using Vec = typename Lanes<T>::Vec;

template <class T>
IHVP_INLINE Vec<T> load(const T* p) {
    return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(p);
}

template <class T>
IHVP_INLINE void store(T* p, Vec<T> v) {
    *reinterpret_cast<typename Lanes<T>::Unaligned*>(p) = v;
}

template <class T>
IHVP_INLINE T sum_lanes(Vec<T> v) {
    T lanes[Lanes<T>::width];
    store(lanes, v);
    for (int half = Lanes<T>::width / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

template <int... lane>
struct LaneList {};
template <int count, int... lane>
struct CountLanes : CountLanes<count - 1, count - 1, lane...> {};
template <int... lane>
struct CountLanes<0, lane...> {
    typedef LaneList<lane...> List;
};

template <class T, int size, int... lane>
IHVP_INLINE void swap_blocks(Vec<T>& a, Vec<T>& b, LaneList<lane...>) {
    Vec<T> low = __builtin_shufflevector(a, b, (lane & size ? Lanes<T>::width + lane - size : lane)...);
    b = __builtin_shufflevector(a, b, (lane & size ? Lanes<T>::width + lane : lane + size)...);
    a = low;
}

// Transposes a square of vectors: blocks of 1, 2, 4, ... lanes change places across the diagonal.
template <class T, int size = 1>
IHVP_INLINE void transpose(Vec<T> (&rows)[Lanes<T>::width]) {
    if constexpr (size < Lanes<T>::width) {
#pragma GCC unroll 16
        for (int r = 0; r < Lanes<T>::width; ++r) {
            if (!(r & size))
                swap_blocks<T, size>(rows[r], rows[r + size], typename CountLanes<Lanes<T>::width>::List{});
        }
        transpose<T, 2 * size>(rows);
    }
}

IHVP_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
IHVP_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
IHVP_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp
