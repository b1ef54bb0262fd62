// out = U_G ((U_G^T V U_A) / (Lambda + damping)) U_A^T of matrices up to 128x128: one block a layer and query keeps the
// matrix in shared memory through all four products; the bases stream by.
#include "mma.cuh"

namespace ihvp {
namespace cuda {

namespace {

constexpr int entries = 16, step = 16;

struct Shared {
    float x[tile][pitch];      // the matrix on its way
    float basis[step][pitch];  // rows k.. of a basis
};

// acc = sum_k X[k,m] U[k,n], or U[k,m] X[k,n] with `left`; U has `size` rows and columns.
template <bool left>
__device__ void product(Accumulators& acc, Shared& shared, const float* U, int64_t stride_k, int64_t stride_c,
                        int64_t size) {
    clear(acc);
    for (int64_t k = 0; k < size; k += step) {
        __syncthreads();
        for (int c = threadIdx.x; c < step * tile; c += threads) {
            int r = c / tile, at = c % tile;
            bool inside = k + r < size && at < size;
            shared.basis[r][at] = inside ? U[(k + r) * stride_k + at * stride_c] : 0.f;
        }
        __syncthreads();
        if (left)
            multiply(acc, shared.basis, shared.x + k, step);
        else
            multiply(acc, shared.x + k, shared.basis, step);
    }
    __syncthreads();  // all have read x: it may be overwritten
}

__global__ void __launch_bounds__(threads, 1) solve(const int64_t* table, const float* damping) {
    IHVP_SHARED_MEMORY(memory);
    auto& shared = *reinterpret_cast<Shared*>(memory);
    int64_t q = blockIdx.x, layer = blockIdx.y;
    const int64_t* row = table + layer * entries;
    auto at = [&](int i) { return reinterpret_cast<const float*>(row[i]); };
    int64_t O = row[5], I = row[6];
    const float *V = at(0) + q * row[7], *U_A = at(1), *U_G = at(2), *Lambda = at(3);
    float* out = reinterpret_cast<float*>(row[4]) + q * O * I;
    float shift = damping[layer];
    for (int c = threadIdx.x; c < tile * tile; c += threads) {  // V^T, zeros around it
        int i = c / tile, o = c % tile;
        shared.x[i][o] = i < I && o < O ? V[o * row[8] + i * row[9]] : 0.f;
    }
    Lane lane;
    Accumulators acc;
    auto each = [&](auto f) {
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) f(lane.m(m, c), lane.n(n, c), acc[m][n][c]);
    };
    product<false>(acc, shared, U_A, row[10], row[11], I);  // V U_A, (o,j)
    each([&](int o, int j, float value) { shared.x[o][j] = value; });
    product<true>(acc, shared, U_G, row[12], row[13], O);  // U_G^T (V U_A), (p,j)
    each([&](int p, int j, float value) {
        bool inside = p < O && j < I;
        shared.x[j][p] = inside ? value / (Lambda[p * row[14] + j * row[15]] + shift) : 0.f;
    });
    product<false>(acc, shared, U_A, row[11], row[10], I);  // (p,i)
    each([&](int p, int i, float value) { shared.x[p][i] = value; });
    product<true>(acc, shared, U_G, row[13], row[12], O);  // (o,i)
    each([&](int o, int i, float value) {
        if (o < O && i < I) out[o * I + i] = value;
    });
}

}  // namespace

const char* launch_ekfac_solve_grouped(const int64_t* table, const float* damping, int64_t layers, int64_t Q,
                                       void* stream) {
    return launch(solve, dim3(unsigned(Q), unsigned(layers)), sizeof(Shared), stream, table, damping);
}

}  // namespace cuda
}  // namespace ihvp
