// A block's 128x128 tile of sum_k A[k,m] B[k,n] on tensor cores: 8 warps, each 64x32, both operands in shared memory
// with k along the rows. A product is three of TF32, which together keep float32's accuracy.
#pragma once
#ifdef IHVP_ON_HOST
#include "on_host.h"
#else
#include "instructions.cuh"
#endif

namespace ihvp {
namespace cuda {

constexpr int tile = 128;
constexpr int pitch = tile + 8;  // eight more: the four rows that a warp reads at once fall into different banks

using Accumulators = float[4][4][4];  // [16 rows][8 columns][element of the thread]

struct Lane {
    int group, member, row, column;  // the thread's place in a fragment, and the corner of its warp's part of the tile

    __device__ Lane() {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        group = lane / 4;
        member = lane % 4;
        row = warp / 4 * 64;
        column = warp % 4 * 32;
    }
    // Where accumulator [i][j][c] stands in the tile.
    __device__ int m(int i, int c) const { return row + i * 16 + group + (c >= 2 ? 8 : 0); }
    __device__ int n(int j, int c) const { return column + j * 8 + member * 2 + c % 2; }
};

__device__ inline void clear(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) acc[i][j][c] = 0;
}

// A fragment's number as TF32, and what that left of it.
__device__ inline void split(float x, uint32_t& high, uint32_t& low) {
    high = tf32(x);
    low = tf32(x - __uint_as_float(high));
}

// acc += sum over `rows` of k of A[k,m] B[k,n]; rows is a multiple of 8.
__device__ inline void multiply(Accumulators& acc, const float (*A)[pitch], const float (*B)[pitch], int rows) {
    Lane lane;
    for (int k = 0; k < rows; k += 8) {
        uint32_t b[4][2], b_low[4][2];
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                split(B[k + lane.member + 4 * h][lane.column + j * 8 + lane.group], b[j][h], b_low[j][h]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t a[4], a_low[4];
#pragma unroll
            for (int h = 0; h < 4; ++h)
                split(A[k + lane.member + h / 2 * 4][lane.row + i * 16 + lane.group + h % 2 * 8], a[h], a_low[h]);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                mma_tf32(acc[i][j], a_low, b[j]);  // the small ones first
                mma_tf32(acc[i][j], a, b_low[j]);
                mma_tf32(acc[i][j], a, b[j]);
            }
        }
    }
}

}  // namespace cuda
}  // namespace ihvp
