// out[part,o,i] = sum_n (sum_t d[n,t,o] x[n,t,i])^2: a second accumulator a tile takes the squares, example by example.
#include "pipeline.cuh"

namespace ihvp {
namespace cuda {

namespace {

template <class T, int terms, bool squared>
__global__ void __launch_bounds__(threads, 1)
    squares(float* out, const T* d, const T* x, int64_t N, int64_t rows_each, int64_t O, int64_t width_d, int64_t I,
            int64_t width_x, int64_t tiles_i, int64_t per_part) {
    IHVP_SHARED_MEMORY(memory);
    auto& shared = *reinterpret_cast<Pipeline<T>*>(memory);
    int64_t o = blockIdx.x / tiles_i * tile, i = blockIdx.x % tiles_i * tile, part = blockIdx.y;
    int64_t first = part * per_part, last = min(first + per_part, N);
    float total[4][4][4];
    clear(total);
    // At T = 1 the square of a product is the product of the squares, and a part's examples one segment.
    if (squared) {
        sum_segments<T, terms, true>(shared, {d, width_d, o}, {x, width_x, i}, part, part + 1, per_part, N,
                                     [&](const Accumulators& acc) {
#pragma unroll
                                         for (int k = 0; k < 64; ++k) (&total[0][0][0])[k] = (&acc[0][0][0])[k];
                                     });
    } else {
        sum_segments<T, terms, false>(shared, {d, width_d, o}, {x, width_x, i}, first, last, rows_each, N * rows_each,
                                      [&](const Accumulators& acc) {
#pragma unroll
                                          for (int k = 0; k < 64; ++k) {
                                              float g = (&acc[0][0][0])[k];
                                              (&total[0][0][0])[k] += g * g;
                                          }
                                      });
    }
    Lane lane;
    for (int m = 0; m < 4; ++m)
        for (int n = 0; n < 4; ++n)
            for (int c = 0; c < 4; ++c) {
                int64_t row = o + lane.m(m, c), column = i + lane.n(n, c);
                if (row < O && column < I) out[(part * O + row) * I + column] = total[m][n][c];
            }
}

}  // namespace

const char* launch_ekfac_diagonal_update(float* out, const void* d, const void* x, Operands type, int64_t N, int64_t T,
                                         int64_t O, int64_t width_d, int64_t I, int64_t width_x, int64_t parts,
                                         int terms, bool squared, void* stream) {
    int64_t tiles_i = (I + tile - 1) / tile, tiles_o = (O + tile - 1) / tile;
    dim3 grid(unsigned(tiles_i * tiles_o), unsigned(parts));
    int64_t per_part = (N + parts - 1) / parts;
    auto run = [&](auto* kernel, auto zero) {
        using Element = decltype(zero);
        return launch(kernel, grid, sizeof(Pipeline<Element>), stream, out, static_cast<const Element*>(d),
                      static_cast<const Element*>(x), N, T, O, width_d, I, width_x, tiles_i, per_part);
    };
    if (type == Operands::bf16) return run(squares<__nv_bfloat16, 1, false>, __nv_bfloat16());
    if (squared) return run(terms == 3 ? squares<float, 3, true> : squares<float, 1, true>, 0.f);
    return run(terms == 3 ? squares<float, 3, false> : squares<float, 1, false>, 0.f);
}

}  // namespace cuda
}  // namespace ihvp
