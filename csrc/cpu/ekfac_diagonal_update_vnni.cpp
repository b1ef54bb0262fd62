// Lambda[o,i] += sum_n (sum_t d[n,t,o] x[n,t,i])^2 with x = a U_A, d = delta U_G for float32, the three products in
// 16-bit fixed point: tokens and bases along the features, projected tokens along the positions of an example. What
// cannot be read so, and other types and orders: as AVX-512 does it.
#include "eigenbasis.h"
#include "fixed_point.h"

namespace ihvp {

namespace avx512 {
Status ekfac_diagonal_update(View, View, View, View, View, View, bool, Order, Precision, int);
}

namespace IHVP_ISA {

namespace {

constexpr int64_t W = fixed_width;
constexpr int64_t chunk_positions = 1024;
constexpr int64_t least_positions = 16;  // of an example: in fewer, reading projected tokens takes the time it saves

// One side of the gradients: tokens, their basis, and the tokens of a chunk in it.
struct Side {
    Rows x;
    View U;
    Panels<float> projected;
    FixedPanels fixed;  // the same; a group is an example
    FixedPanels basis;  // of no group where it is the standard one

    static void plan(Workspace& space, const Rows& x, const View& U, int64_t examples, int64_t positions) {
        space.plan<float>(Panels<float>::size(examples * positions, x.features));
        space.plan<float>(FixedPanels::size(examples, positions, x.features));
        space.plan<float>(FixedPanels::size(U.data ? 1 : 0, x.features, x.features));
    }
    Side(Workspace& space, const Rows& x, const View& U, int64_t examples, int64_t positions)
        : x(x),
          U(U),
          projected{space.take<float>(Panels<float>::size(examples * positions, x.features)), 0, x.features},
          fixed(space.take<float>(FixedPanels::size(examples, positions, x.features)), examples, positions, x.features),
          basis(space.take<float>(FixedPanels::size(U.data ? 1 : 0, x.features, x.features)), U.data ? 1 : 0,
                x.features, x.features) {}
};

// What a thread needs to read a panel of a basis or a task's tokens.
struct Scratch {
    float* memory;
    int64_t own;

    static int64_t size(int64_t d, int64_t rows) {
        int64_t columns = most(rows, W);
        return Panels<float>::size(d, columns) + FixedPanels::size(1, d, columns);
    }
    float* of(int thread) const { return memory + thread * own; }
};

bool read_basis(const Side& side, const Scratch& scratch, int threads) {
    if (!side.U.data) return true;
    const FixedPanels& basis = side.basis;
    Rows rows = matrix_rows(side.U);
    Readable readable;
    parallel(threads, basis.words.count(), [&](int64_t p, int thread) {
        Panels<float> panel{scratch.of(thread), rows.features, least(W, rows.features - p * W)};
        pack_straight(panel, rows, 0, 0, rows.count, p * W);
        for (int64_t b = 0; b < basis.blocks.count; ++b)
            readable.note(basis.fill(0, b, p, panel.at(basis.blocks.begin(b), 0)));
    });
    return bool(readable);
}

// side.projected = the positions first.. of x in the basis.
bool project(const Side& side, int64_t first, const Scratch& scratch, int threads) {
    int64_t d = side.x.features, count = side.projected.depth, rows = rows_of_a_task<float>(count, threads);
    if (!side.U.data) {
        pack_straight(side.projected, side.x, first, threads);
        return true;
    }
    Readable readable;
    parallel(threads, ceil_div(count, rows), [&](int64_t task, int thread) {
        int64_t at = task * rows, own = least(rows, count - at);
        Panels<float> plain{scratch.of(thread), d, own};
        FixedPanels tokens(plain.data + Panels<float>::size(d, own), 1, d, own);
        for (int64_t p = 0; p < plain.count(); ++p) {
            pack_transposed(plain, p, side.x, first + at);
            for (int64_t b = 0; b < tokens.blocks.count; ++b)
                readable.note(tokens.fill(0, b, p, plain.at(tokens.blocks.begin(b), p * W)));
        }
        StorePanels<float, false> store_tile{side.projected};
        const Panels<Words>& basis = side.basis.words;
        for (int64_t p = 0; p < basis.count(); ++p) {
            const char* next = reinterpret_cast<const char*>(basis.at(0, (p + 1) % basis.count() * W));
            int64_t share = W * int64_t(sizeof(Words)) * tile_rows / own;
            for (int64_t i = 0; i < own; i += tile_rows, next += basis.depth * share) {
                Tile<float> tile = {};
                add_product(tile, tokens, i, side.basis, p, 0, Ahead{next, share});
                store_tile(tile, at + i, p * W);
            }
        }
    });
    return bool(readable);
}

// side.fixed of `count` examples from `first` on.
bool read_tokens(Side& side, int64_t first, int64_t count, const Scratch& scratch, int threads) {
    int64_t positions = side.fixed.blocks.k, blocks = side.fixed.blocks.count;
    side.projected.depth = count * positions;
    if (!project(side, first * positions, scratch, threads)) return false;
    Readable readable;
    parallel(threads, count * blocks, [&](int64_t task, int) {
        int64_t n = task / blocks, b = task % blocks, k0 = n * positions + side.fixed.blocks.begin(b);
        for (int64_t p = 0; p < side.projected.count(); ++p)
            readable.note(side.fixed.fill(n, b, p, side.projected.at(k0, p * W)));
    });
    return bool(readable);
}

// Lambda += sum over the chunk, a tile at a time: one tile is owned by one thread and sums its examples in order.
template <class S>
void add_squares(const View& Lambda, const FixedPanels& d, const FixedPanels& x, int64_t examples, int threads) {
    auto add = matrix_target<float, S, true>(Lambda);
    int64_t panels = x.words.count();
    parallel(threads, d.words.count() * panels, [&](int64_t task, int) {
        int64_t p = task % panels, first = task / panels * W, end = least(d.words.columns, first + W);
        const char* next = reinterpret_cast<const char*>(x.words.at(0, (p + 1) % panels * W));
        int64_t share = W * int64_t(sizeof(Words)) * tile_rows / (end - first);
        for (int64_t i = first; i < end; i += tile_rows) {
            Tile<float> sum = {};
            for (int64_t n = 0; n < examples; ++n, next += x.blocks.pairs * share) {
                Tile<float> g = {};
                add_product(g, d, i, x, p, n, Ahead{next, share});
                sum.vectors = g.vectors;
                for (int r = 0; r < tile_rows; ++r) {
                    for (int v = 0; v < g.vectors; ++v) sum.acc[r][v] += g.acc[r][v] * g.acc[r][v];
                }
            }
            add(sum, i, p * W);
        }
    });
}

// Examples from `first` on.
View rest(View x, int64_t first) {
    if (x.data) x.data = static_cast<char*>(x.data) + first * x.stride[0] * element_size(x.dtype);
    x.shape[0] -= first;
    return x;
}

}  // namespace

Status ekfac_diagonal_update(View Lambda, View a, View delta, View U_A, View U_G, View mask, bool bias, Order order,
                             Precision precision, int threads) {
    int64_t N = a.shape[0], positions = a.shape[1], done = 0;
    bool wide = a.dtype == DType::f64 || delta.dtype == DType::f64 || (U_A.data && U_A.dtype == DType::f64) ||
                (U_G.data && U_G.dtype == DType::f64);
    if (precision == Precision::int16 && order == Order::project_first && positions >= least_positions && !wide) {
        Rows rows_a = token_rows(a, mask, bias), rows_delta = token_rows(delta, mask, false);
        int64_t examples = chunk_of_examples(N, positions, chunk_positions);
        int64_t rows = rows_of_a_task<float>(examples * positions, threads);
        int64_t own = Scratch::size(most(rows_a.features, rows_delta.features), rows);
        Workspace space;
        Side::plan(space, rows_a, U_A, examples, positions);
        Side::plan(space, rows_delta, U_G, examples, positions);
        space.plan<float>(threads * own);
        if (!space.allocate()) return Status::out_of_memory;
        Side x(space, rows_a, U_A, examples, positions), d(space, rows_delta, U_G, examples, positions);
        Scratch scratch{space.take<float>(threads * own), own};
        bool readable = read_basis(x, scratch, threads) && read_basis(d, scratch, threads);
        for (; done < N && readable; done += readable ? examples : 0) {
            int64_t count = least(examples, N - done);
            readable = read_tokens(x, done, count, scratch, threads) && read_tokens(d, done, count, scratch, threads);
            if (!readable) break;
            auto add = Lambda.dtype == DType::f64 ? add_squares<double> : add_squares<float>;
            add(Lambda, d.fixed, x.fixed, count, threads);
        }
        if (done >= N) return Status::ok;
    }
    return avx512::ekfac_diagonal_update(Lambda, rest(a, done), rest(delta, done), U_A, U_G, rest(mask, done), bias,
                                         order, precision, threads);
}

}  // namespace IHVP_ISA
}  // namespace ihvp
