// S[m,n] = sum_o y1[m,o] y2[n,o] (sum_i x1[m,i] x2[n,i] weight[i,o]) for float32, in 16-bit fixed point on dot products
// of pairs: a row of products x1[m] x2[n] with a column of the weight. The relative error, of norms, is about 1e-4.
// Where a number cannot be read so, nothing is computed here, but all in float32.
#include "fixed_point.h"

namespace ihvp {

namespace avx512 {
Status weighted_ghost_dot(View, View, View, View, View, View, View, View, bool, Precision, int);
}

namespace IHVP_ISA {

namespace {

constexpr int64_t width = fixed_width, chunk_examples = 2048;
constexpr int64_t together = 4;  // rows m that share a block of the weight in the L2 cache

// `done` is set when the result is there.
Status run(const View& out, const Rows& x1, const Rows& y1, const Rows& x2, const Rows& y2, const Rows& weight,
           bool rows_are_columns, int threads, bool& done) {
    int64_t M = x1.count, N = x2.count, I = x1.features, O = y1.features;
    int64_t chunk = least(N, chunk_examples), panels = ceil_div(O, width), padded = panels * width;
    Blocks blocks(I);
    int64_t size_x = most(Panels<float>::size(I, O), Panels<float>::size(I, chunk));
    int64_t own_floats = together * (I + padded) + padded, own_words = blocks.each * width;
    Workspace space;
    space.plan<Words>(blocks.pairs * padded);
    space.plan<float>(blocks.count * padded);
    space.plan<float>(size_x);
    space.plan<float>(Panels<float>::size(chunk, O));
    space.plan<float>(threads * own_floats);
    space.plan<Words>(threads * own_words);
    if (!space.allocate()) return Status::out_of_memory;
    Words* memory_w = space.take<Words>(blocks.pairs * padded);
    float* unit_w = space.take<float>(blocks.count * padded);
    float* memory_x = space.take<float>(size_x);  // first the weight's
    float* memory_y = space.take<float>(Panels<float>::size(chunk, O));
    float* scratch = space.take<float>(threads * own_floats);
    Words* products = space.take<Words>(threads * own_words);
    float* result = static_cast<float*>(out.data);
    Readable readable;
    auto w = [&](int64_t b) { return Panels<Words>{memory_w + b * blocks.each * padded, blocks.depth(b), O}; };

    Panels<float> plain{memory_x, I, O};
    if (rows_are_columns) {
        pack_transposed(plain, weight, 0, threads);
    } else {
        pack_straight(plain, weight, 0, threads);
    }
    parallel(threads, panels, [&](int64_t p, int) {
        const float* in = plain.at(0, p * width);
        auto row = [&](int64_t k, int v) { return _mm512_loadu_ps(in + k * width + v * 16); };
        for (int64_t b = 0; b < blocks.count; ++b) {
            float* unit = unit_w + b * padded + p * width;
            readable.note(find_units(unit, blocks.begin(b), blocks.end(b), row));
            quantise(w(b).at(0, p * width), blocks.begin(b), blocks.end(b), unit, row);
        }
    });
    if (!readable) return Status::ok;

    for (int64_t first = 0; first < N; first += chunk) {
        int64_t count = least(chunk, N - first);
        Panels<float> x{memory_x, I, count}, y{memory_y, count, O};
        pack_transposed(x, x2, first, threads);
        pack_straight(y, y2, first, threads);
        parallel(threads, ceil_div(M, together) * x.count(), [&](int64_t task, int thread) {
            int64_t m0 = task / x.count() * together, some = least(together, M - m0);
            int64_t p = task % x.count(), columns = least(width, count - p * width);
            float* rows_x = scratch + thread * own_floats;
            float* rows_y = rows_x + together * I;
            float* scaled_y = rows_y + together * padded;
            Words* own = products + thread * own_words;
            for (int64_t m = 0; m < some; ++m) {
                x1.read(rows_x + m * I, m0 + m, 0, I);
                y1.read(rows_y + m * padded, m0 + m, 0, O);
                for (int64_t c = O; c < padded; ++c) rows_y[m * padded + c] = 0;
            }
            const float* in = x.at(0, p * width);
            Vec<float> totals[together][width] = {};
            for (int64_t step = 0; step < blocks.count * some; ++step) {
                int64_t b = step / some, m = step % some;
                const float* row_x = rows_x + m * I;
                auto row = [&](int64_t k, int v) {
                    return _mm512_loadu_ps(in + k * width + v * 16) * _mm512_set1_ps(row_x[k]);
                };
                float unit[width];
                readable.note(find_units(unit, blocks.begin(b), blocks.end(b), row));
                quantise(own, blocks.begin(b), blocks.end(b), unit, row);
                for (int64_t c = 0; c < padded; ++c) scaled_y[c] = rows_y[m * padded + c] * unit_w[b * padded + c];
                Panels<Words> left{own, blocks.depth(b), columns};
                product(left, 0, columns, w(b), 0, panels, [&](const Tile<Words>& tile, int64_t i, int64_t j) {
                    for (int r = 0; r < tile_rows && i + r < columns; ++r) {
                        Vec<float> sum = {};
                        for (int v = 0; v < tile.vectors; ++v) {
                            Vec<float> both = load(scaled_y + j + v * 16) * load(y.at(p * width + i + r, j) + v * 16);
                            sum += _mm512_cvtepi32_ps((__m512i)tile.acc[r][v]) * both;
                        }
                        totals[m][i + r] += sum * unit[i + r];
                    }
                });
            }
            for (int64_t m = 0; m < some; ++m) {
                float* to = result + (m0 + m) * out.stride[0];
                for (int64_t c = 0; c < columns; ++c)
                    to[(first + p * width + c) * out.stride[1]] = sum_lanes<float>(totals[m][c]);
            }
        });
        if (!readable) return Status::ok;
    }
    done = true;
    return Status::ok;
}

}  // namespace

Status weighted_ghost_dot(View out, View a1, View delta1, View a2, View delta2, View weight, View mask1, View mask2,
                          bool bias, Precision precision, int threads) {
    if (out.dtype == DType::f32 && precision == Precision::int16) {
        Rows x1 = token_rows(a1, mask1, bias), x2 = token_rows(a2, mask2, bias);
        Rows y1 = token_rows(delta1, mask1, false), y2 = token_rows(delta2, mask2, false), w = matrix_rows(weight);
        bool done = false, swap = y1.features > x1.features;  // contract over the longer side
        Status status =
            swap ? run(out, y1, x1, y2, x2, w, false, threads, done) : run(out, x1, y1, x2, y2, w, true, threads, done);
        if (done || status != Status::ok) return status;
    }
    return avx512::weighted_ghost_dot(out, a1, delta1, a2, delta2, weight, mask1, mask2, bias, precision, threads);
}

}  // namespace IHVP_ISA
}  // namespace ihvp
