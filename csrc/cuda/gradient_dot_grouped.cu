// out[layer,q,n] = <P_layer[q], g_layer[n]>: one block a layer and example makes g's tile in registers and meets it there
// with every query, so that g is made once and never stored.
#include "mma.cuh"

namespace ihvp {
namespace cuda {

namespace {

constexpr int entries = 14, step = 16, queries = 64, warps = threads / 32;

struct Tokens {
    float delta[step][pitch], a[step][pitch];
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rows t.. of one example's tokens, columns first..; masked and missing ones are zero, column `features` the implicit 1.
template <class T>
__device__ void fill(float (*to)[pitch], const T* x, int64_t stride_t, int64_t stride_i, const unsigned char* mask,
                     int64_t t, int64_t end, int64_t first, int64_t features, bool bias) {
    for (int c = threadIdx.x; c < step * tile; c += threads) {
        int k = c / tile, at = c % tile;
        int64_t i = first + at;
        bool real = t + k < end && (mask == nullptr || mask[t + k] != 0);
        float value = real && bias && i == features ? 1.f : 0.f;
        if (real && i < features) value = widen(x[(t + k) * stride_t + i * stride_i]);
        to[k][at] = value;
    }
}

template <class T, int terms>
__global__ void __launch_bounds__(threads, 1)
    grouped(float* out, const int64_t* table, const unsigned char* mask, int64_t Q, int64_t N, int64_t T_, bool bias) {
    IHVP_SHARED_MEMORY(memory);
    auto& tokens = *reinterpret_cast<Tokens*>(memory);
    __shared__ float sums[warps][queries];
    int64_t n = blockIdx.x, layer = blockIdx.y, first_q = int64_t(blockIdx.z) * queries;
    const int64_t* row = table + layer * entries;
    auto P = reinterpret_cast<const float*>(row[0]);
    auto a = reinterpret_cast<const T*>(row[1]) + n * row[8];
    auto delta = reinterpret_cast<const T*>(row[2]) + n * row[11];
    int64_t O = row[3], I = row[4];
    int width = int(I);
    if (mask != nullptr) mask += n * T_;
    int count = int(min(int64_t(queries), Q - first_q));
    int warp = threadIdx.x / 32;
    for (int q = threadIdx.x % 32; q < queries; q += 32) sums[warp][q] = 0;
    __syncwarp();
    Lane lane;
    for (int64_t o = 0; o < O; o += tile)
        for (int64_t i = 0; i < I; i += tile) {
            Accumulators g;
            clear(g);
            for (int64_t t = 0; t < T_; t += step) {
                __syncthreads();  // all have read the step before
                fill(tokens.delta, delta, row[12], row[13], mask, t, T_, o, O, false);
                fill(tokens.a, a, row[9], row[10], mask, t, T_, i, I - bias, bias);
                __syncthreads();
                multiply<terms, false>(g, tokens.delta, tokens.a, step);
            }
            int height = int(min(O - o, int64_t(tile))), breadth = int(min(I - i, int64_t(tile)));
            for (int q = 0; q < count; ++q) {
                const float* own = P + ((first_q + q) * O + o + lane.m(0, 0)) * width + i + lane.n(0, 0);
                float sum = 0;
#pragma unroll
                for (int m = 0; m < 4; ++m)
#pragma unroll
                    for (int j = 0; j < 4; ++j)
#pragma unroll
                        for (int c = 0; c < 4; ++c) {
                            bool inside = lane.m(m, c) < height && lane.n(j, c) < breadth;
                            if (inside) sum += own[(m * 16 + c / 2 * 8) * width + j * 8 + c % 2] * g[m][j][c];
                        }
                for (int half = 16; half > 0; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
                if (threadIdx.x % 32 == 0) sums[warp][q] += sum;
            }
        }
    __syncthreads();
    for (int q = threadIdx.x; q < count; q += threads) {
        float sum = 0;
        for (int w = 0; w < warps; ++w) sum += sums[w][q];
        out[(layer * Q + first_q + q) * N + n] = sum;
    }
}

}  // namespace

const char* launch_gradient_dot_grouped(float* out, const int64_t* table, const unsigned char* mask, Operands type,
                                        int64_t layers, int64_t Q, int64_t N, int64_t T, bool bias, int terms,
                                        void* stream) {
    dim3 grid(unsigned(N), unsigned(layers), unsigned((Q + queries - 1) / queries));
    auto run = [&](auto* kernel) {
        return launch(kernel, grid, sizeof(Tokens), stream, out, table, mask, Q, N, T, bias);
    };
    // 16-bit numbers are exact in TF32, but float16's smallest; those are far below any sum's rounding.
    if (type == Operands::bf16) return run(grouped<__nv_bfloat16, 1>);
    if (type == Operands::f16) return run(grouped<__half, 1>);
    return run(terms == 3 ? grouped<float, 3> : grouped<float, 1>);
}

}  // namespace cuda
}  // namespace ihvp
