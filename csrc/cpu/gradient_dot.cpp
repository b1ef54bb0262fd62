// S[q,n] = sum_t delta[n,t]^T P[q] a[n,t], or S[q,n,t] without the sum.
// query_first: (delta P[q])[m,i] by one product a query, then a row dot with a.
// gradient_first: see gradient_first.h.
#include "gradient_first.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

// A tile's rows times those of x, added to each row's sum.
template <class T>
struct RowDots {
    T* sums;
    const Panels<T>& x;
    int64_t end;
    static constexpr int64_t lanes = Lanes<T>::width;

    IHVP_INLINE void operator()(const Tile<T>& tile, int64_t i, int64_t j) const {
        int height = int(least(tile_rows, end - i));
        for (int r = 0; r < height; ++r) {
            T* at = sums + (i + r) * lanes;
            Vec<T> sum = load(at);
            const T* row = x.at(i + r, j);
            for (int v = 0; v < tile.vectors; ++v) sum += tile.acc[r][v] * load(row + v * lanes);
            store(at, sum);
        }
    }
};

// The products delta P_q of a chunk of positions.
template <class T>
class Products {
  public:
    using Type = T;

    static void plan(Workspace& space, int64_t O, int64_t positions, int threads) {
        space.plan<T>(Left<T>::size(O, positions));
        space.plan<T>(threads * 2 * Panels<T>::size(O, Panels<T>::width));
    }
    Products(Workspace& space, int64_t O, int64_t positions, int threads)
        : delta_{space.take<T>(Left<T>::size(O, positions)), O, 0},
          scratch_(space.take<T>(threads * 2 * Panels<T>::size(O, Panels<T>::width))) {}

    bool read(const Rows& delta, int64_t first, int64_t count, int threads) {
        delta_.columns = count;
        pack_transposed(delta_, delta, first, threads);
        return true;
    }
    // finish(tile, position, input) for the positions i0..i1.
    template <class Finish>
    bool multiply(const Rows& query, int64_t i0, int64_t i1, int thread, const Finish& finish) const {
        T* own = scratch_ + thread * 2 * Panels<T>::size(delta_.depth, Panels<T>::width);
        product_packing(delta_, i0, i1, query, 0, query.features, own, finish);
        return true;
    }

  private:
    Left<T> delta_;
    T* scratch_;
};

#ifdef __AVX512VNNI__
// The same in fixed point along the outputs; false where these cannot be read so.
class FixedProducts {
  public:
    using Type = float;
    static constexpr int64_t W = fixed_width;

    static void plan(Workspace& space, int64_t O, int64_t positions, int threads) {
        space.plan<float>(FixedPanels::size(1, O, positions));
        space.plan<float>(threads * own_size(O));
    }
    FixedProducts(Workspace& space, int64_t O, int64_t positions, int threads)
        : delta_(space.take<float>(FixedPanels::size(1, O, positions)), 1, O, positions),
          scratch_(space.take<float>(threads * own_size(O))) {}

    bool read(const Rows& delta, int64_t first, int64_t count, int threads) {
        delta_.words.columns = count;
        Readable readable;
        parallel(threads, delta_.words.count(), [&](int64_t p, int thread) {
            Panels<float> plain{scratch(thread), delta_.blocks.k, least(W, count - p * W)};
            pack_transposed(plain, 0, delta, first + p * W);
            for (int64_t b = 0; b < delta_.blocks.count; ++b)
                readable.note(delta_.fill(0, b, p, plain.at(delta_.blocks.begin(b), 0)));
        });
        return bool(readable);
    }
    template <class Finish>
    bool multiply(const Rows& query, int64_t i0, int64_t i1, int thread, const Finish& finish) const {
        int64_t O = delta_.blocks.k;
        FixedPanels panel(scratch(thread) + Panels<float>::size(O, W), 1, O, W);
        bool readable = true;
        for (int64_t c = 0; c < query.features; c += W) {
            Panels<float> plain{scratch(thread), O, least(W, query.features - c)};
            pack_straight(plain, query, 0, 0, O, c);
            for (int64_t b = 0; b < panel.blocks.count; ++b)
                readable = panel.fill(0, b, 0, plain.at(panel.blocks.begin(b), 0)) && readable;
            for (int64_t i = i0; i < i1; i += tile_rows) {
                Tile<float> tile = {};
                add_product(tile, delta_, i, panel, 0, 0);
                finish(tile, i, c);
            }
        }
        return readable;
    }

  private:
    static int64_t own_size(int64_t O) {  // a panel, packed and in fixed point
        return Panels<float>::size(O, W) + FixedPanels::size(1, O, W);
    }
    float* scratch(int thread) const { return scratch_ + thread * own_size(delta_.blocks.k); }

    FixedPanels delta_;
    float* scratch_;
};
#endif

// `done` is set when the result is there.
template <class Products>
Status query_first(const View& out, const View& P, const Rows& a, const Rows& delta, int64_t N, int64_t positions,
                   bool per_token, int threads, bool& done) {
    using T = typename Products::Type;
    constexpr int64_t W = Panels<T>::width, lanes = Lanes<T>::width;
    constexpr int64_t chunk_positions = 2048, block_positions = 384;  // of a product: d stays in the L2 cache
    int64_t Q = P.shape[0], I = a.features, O = delta.features;
    int64_t examples = chunk_of_examples(N, positions, chunk_positions), depth = examples * positions;
    Workspace space;
    Products::plan(space, O, depth, threads);
    space.plan<T>(Panels<T>::size(depth, I));
    space.plan<T>(threads * block_positions * lanes);
    space.plan<T>(Q * depth);
    if (!space.allocate()) return Status::out_of_memory;
    Products products(space, O, depth, threads);
    T* memory_x = space.take<T>(Panels<T>::size(depth, I));
    T* scratch = space.take<T>(threads * block_positions * lanes);
    T* dots = space.take<T>(Q * depth);
    T* result = static_cast<T*>(out.data);
    for (int64_t first = 0; first < N; first += examples) {
        int64_t count = least(examples, N - first), rows = count * positions;
        Panels<T> x{memory_x, rows, I};
        if (!products.read(delta, first * positions, rows, threads)) return Status::ok;
        pack_straight(x, a, first * positions, threads);
        int64_t blocks = most(ceil_div(rows, block_positions), least(ceil_div(rows, W), ceil_div(2 * threads, Q)));
        int64_t block = ceil_div(ceil_div(rows, blocks), tile_rows) * tile_rows;
        Readable readable;
        parallel(threads, Q * blocks, [&](int64_t task, int thread) {
            int64_t q = task / blocks, i0 = task % blocks * block, i1 = least(rows, i0 + block);
            if (i0 >= i1) return;
            T* sums = scratch + (thread * block_positions - i0) * lanes;
            for (int64_t e = i0 * lanes; e < i1 * lanes; ++e) sums[e] = 0;
            readable.note(products.multiply(matrix_rows(entry(P, q)), i0, i1, thread, RowDots<T>{sums, x, i1}));
            for (int64_t i = i0; i < i1; ++i) dots[q * depth + i] = sum_lanes<T>(load(sums + i * lanes));
        });
        if (!readable) return Status::ok;
        for (int64_t q = 0; q < Q; ++q) {
            for (int64_t n = 0; n < count; ++n) {
                const T* at = dots + q * depth + n * positions;
                T* target = result + q * out.stride[0] + (first + n) * out.stride[1];
                if (per_token) {
                    for (int64_t t = 0; t < positions; ++t) target[t * out.stride[2]] = at[t];
                } else {
                    T sum = 0;
                    for (int64_t t = 0; t < positions; ++t) sum += at[t];
                    *target = sum;
                }
            }
        }
    }
    done = true;
    return Status::ok;
}

}  // namespace

Status gradient_dot(View out, View P, View a, View delta, View mask, bool bias, bool per_token, Order order,
                    Precision precision, int threads) {
    Rows rows_a = token_rows(a, mask, bias), rows_delta = token_rows(delta, mask, false);
    Group one{&P, &a, &delta, mask, bias, 1};
    return IHVP_COMPUTE(out.dtype == DType::f64, [&](auto zero) {
        using T = decltype(zero);
        if (order == Order::gradient_first) return gradient_first<T>(out, one, precision, threads);
        bool done = false;
#ifdef __AVX512VNNI__
        if (sizeof(T) == sizeof(float) && precision == Precision::int16 && rows_delta.features >= least_depth) {
            Status status = query_first<FixedProducts>(out, P, rows_a, rows_delta, a.shape[0], a.shape[1], per_token,
                                                       threads, done);
            if (done || status != Status::ok) return status;
        }
#endif
        return query_first<Products<T>>(out, P, rows_a, rows_delta, a.shape[0], a.shape[1], per_token, threads, done);
    });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
