// out[part] += x^T x, tiles on and above the diagonal: float32 over a chunk of rows, then added to float64.
#include "pipeline.cuh"

namespace ihvp {
namespace cuda {

namespace {

template <class T, int terms>
__global__ void __launch_bounds__(threads, 1)
    covariance(double* out, const T* x, int64_t rows, int64_t d, int64_t width, int64_t chunk, int64_t chunks_each) {
    IHVP_SHARED_MEMORY(memory);
    auto& shared = *reinterpret_cast<Pipeline<T>*>(memory);
    // Tile k of the upper triangle, by columns: k = column (column + 1) / 2 + row.
    int k = blockIdx.x;
    int column = int((sqrtf(8.f * float(k) + 1.f) - 1.f) * 0.5f);
    while (column * (column + 1) / 2 > k) --column;
    while ((column + 1) * (column + 2) / 2 <= k) ++column;
    int64_t i = int64_t(k - column * (column + 1) / 2) * tile, j = int64_t(column) * tile;
    int64_t part = blockIdx.y, first = part * chunks_each, last = min(first + chunks_each, (rows + chunk - 1) / chunk);
    double* corner = out + (part * d + i) * d + j;
    int pitch_out = int(d);  // within a tile 32 bits are enough
    int height = int(min(d - i, int64_t(tile))), breadth = int(min(d - j, int64_t(tile)));
    Lane lane;
    sum_segments<T, terms, false>(shared, {x, width, i}, {x, width, j}, first, last, chunk, rows,
                                  [&](const Accumulators& acc) {
#pragma unroll
                                      for (int m = 0; m < 4; ++m)
#pragma unroll
                                          for (int n = 0; n < 4; ++n)
#pragma unroll
                                              for (int c = 0; c < 4; ++c) {
                                                  int r = lane.m(m, c), s = lane.n(n, c);
                                                  if (r < height && s < breadth) corner[r * pitch_out + s] += acc[m][n][c];
                                              }
                                  });
}

}  // namespace

const char* launch_covariance_update(double* out, const void* x, Operands type, int64_t rows, int64_t d, int64_t width,
                                     int64_t parts, int64_t chunk, int terms, void* stream) {
    int64_t side = (d + tile - 1) / tile, chunks = (rows + chunk - 1) / chunk;
    dim3 grid(unsigned(side * (side + 1) / 2), unsigned(parts));
    auto run = [&](auto* kernel, auto zero) {
        using Element = decltype(zero);
        return launch(kernel, grid, sizeof(Pipeline<Element>), stream, out, static_cast<const Element*>(x), rows, d,
                      width, chunk, (chunks + parts - 1) / parts);
    };
    if (type == Operands::bf16) return run(covariance<__nv_bfloat16, 1>, __nv_bfloat16());
    return run(terms == 3 ? covariance<float, 3> : covariance<float, 1>, 0.f);
}

}  // namespace cuda
}  // namespace ihvp
