// Products summed over segments of rows, with one pipeline of asynchronous copies that never drains between segments:
// an example's rows, or a chunk of positions. What follows a segment's sum is the epilogue.
#pragma once
#include "mma.cuh"

namespace ihvp {
namespace cuda {

constexpr int stages = 4;

// Rows side by side, each `width` elements, a multiple of 16 bytes; the tile begins at `column`.
template <class T>
struct Operand {
    const T* data;
    int64_t width, column;
};

template <class T>
__device__ void fetch(Slab<T>& slab, const Operand<T>& x, int64_t row, int64_t end) {
    constexpr int per_copy = 16 / sizeof(T), copies = tile / per_copy;
#pragma unroll
    for (int c = threadIdx.x; c < slab_rows<T> * copies; c += threads) {
        int k = c / copies, at = c % copies * per_copy;
        bool inside = row + k < end && x.column + at < x.width;
        const T* from = inside ? x.data + (row + k) * x.width + x.column + at : x.data;
        copy_async(&slab[k][at], from, inside);
    }
}

template <class T>
struct Pipeline {
    Slab<T> a[stages], b[stages];
};

// For segments [first, last) of `length` rows each, of `rows` in all: epilogue(sum over the segment of A B).
template <class T, int terms, bool square, class Epilogue>
__device__ void sum_segments(Pipeline<T>& shared, const Operand<T>& A, const Operand<T>& B, int64_t first,
                             int64_t last, int64_t length, int64_t rows, const Epilogue& epilogue) {
    constexpr int step = slab_rows<T>;
    int64_t fetched_segment = first, fetched_row = 0;
    int into = 0;
    auto fetch_next = [&] {
        if (fetched_segment < last) {
            int64_t row = fetched_segment * length, end = min(row + length, rows);
            fetch(shared.a[into], A, row + fetched_row, end);
            fetch(shared.b[into], B, row + fetched_row, end);
            into = into + 1 == stages ? 0 : into + 1;
            fetched_row += step;
            if (fetched_row >= length) {
                fetched_row = 0;
                ++fetched_segment;
            }
        }
        commit_copies();
    };
    for (int s = 0; s < stages - 1; ++s) fetch_next();
    Accumulators acc;
    clear(acc);
    int from = 0;
    for (int64_t segment = first; segment < last; ++segment) {
        for (int64_t row = 0; row < length; row += step) {
            wait_for_copies<stages - 2>();
            __syncthreads();  // this slab has come for all, and all are done with the one that is fetched into next
            fetch_next();
            multiply<terms, square>(acc, shared.a[from], shared.b[from], step);
            from = from + 1 == stages ? 0 : from + 1;
        }
        epilogue(acc);
        clear(acc);
    }
}

}  // namespace cuda
}  // namespace ihvp
