// S[q,n] = sum over layers of <P[q], g_n>: a block of g_n = sum_t delta a^T for a chunk of examples, then its dots with
// that block of P; g is never whole, and P is read once for those examples. One layer is a group of one.
#pragma once
#include "amx.h"
#include "fixed_point.h"

namespace ihvp {
namespace IHVP_ISA {
namespace {

// Layers that share their positions: P (Q,O,I'), a (N,T,I), delta (N,T,O) of each.
struct Group {
    const View *P, *a, *delta;
    View mask;
    bool bias;
    int64_t layers;

    int64_t outputs(int64_t layer) const { return delta[layer].shape[2]; }
    int64_t inputs(int64_t layer) const { return a[layer].shape[2] + (bias ? 1 : 0); }
};

// The dot tile: queries x examples, vectors along the parameters. Its sums stay vectors until the very end.
constexpr int dot_queries = tile_rows >= 8 ? 4 : 2;
constexpr int dot_examples = tile_rows >= 8 ? 6 : 4;
constexpr int64_t block_side = 192;   // of a square block of g
constexpr int64_t dot_length = 1536;  // elements of a block that a dot tile takes at a time
constexpr int64_t apart = 160;        // elements between blocks: a tile's examples lie in other sets of the L1 cache

// The same rows of `count` queries or examples: `next` elements from one of them to the other.
template <class T>
struct Several {
    const T* data = nullptr;
    int64_t next = 0, stride = 0, count = 0;

    IHVP_INLINE void fetch(int64_t row, int64_t column) const {
        for (int64_t e = 0; e < count; ++e) __builtin_prefetch(data + e * next + row * stride + column, 0, 2);
    }
};

// What the next tiles will read, next_P and next_g, is fetched into the L2 cache meanwhile. A function of its own: its
// sums fill the vector registers.
template <class T>
__attribute__((noinline)) void dot_tile(T* sums, int64_t stride_sums, Several<T> P, Several<T> g, int64_t rows,
                                        int64_t columns, Several<T> next_P, Several<T> next_g) {
    constexpr int lanes = Lanes<T>::width;
    Vec<T> acc[dot_queries][dot_examples];
    for (int i = 0; i < dot_queries; ++i) {
        for (int j = 0; j < dot_examples; ++j) acc[i][j] = load(sums + i * stride_sums + j * lanes);
    }
    for (int64_t r = 0; r < rows; ++r) {
        const T* p = P.data + r * P.stride;
        const T* x = g.data + r * g.stride;
        for (int64_t c = 0; c < columns; c += lanes) {
            next_P.fetch(r, c);
            next_g.fetch(r, c);
            Vec<T> b[dot_examples];
#pragma GCC unroll 8
            for (int j = 0; j < dot_examples; ++j) b[j] = load(x + j * g.next + c);
#pragma GCC unroll 8
            for (int i = 0; i < dot_queries; ++i) {
                Vec<T> a = load(p + i * P.next + c);
#pragma GCC unroll 8
                for (int j = 0; j < dot_examples; ++j) acc[i][j] += a * b[j];
            }
        }
    }
    for (int i = 0; i < dot_queries; ++i) {
        for (int j = 0; j < dot_examples; ++j) store(sums + i * stride_sums + j * lanes, acc[i][j]);
    }
}

// The outputs o0..o1 and inputs i0..i1 of g, in rows of `stride`.
struct Block {
    int64_t o0, o1, i0, i1, stride;
};

// The rows first..first + count of an operand, their bytes shared out among `tiles` products of some depth, each of
// which fetches its share: short pieces of far rows, which no hardware prefetcher foresees.
class SharedFetch {
  public:
    SharedFetch(const Rows& m, int64_t first, int64_t count, int64_t c0, int64_t c1, int64_t tiles, int64_t depth)
        : m_(m), end_(least(first + count, m.count)), first_(first), c0_(c0) {
        pieces_ = most(1, tiles / most(count, 1));
        rows_ = ceil_div(count, tiles);
        int64_t line = 64, bytes = (least(c1, m.stored) - c0) * element_size(m.dtype);
        bytes_ = ceil_div(ceil_div(bytes, pieces_), line) * line;
        period_ = most(1, depth / most(rows_, 1));
        stride_ = ceil_div(bytes_, period_);
    }
    Ahead of_tile(int64_t tile) const {
        int64_t row = first_ + tile / pieces_ * rows_;
        const char* data = row < end_ ? place(m_, row, c0_) : nullptr;
        if (data == nullptr) return {};
        int64_t jump = m_.stride_inner * element_size(m_.dtype) - stride_ * period_;
        return {data + tile % pieces_ * bytes_, stride_, period_, jump};
    }

  private:
    const Rows& m_;
    int64_t end_, first_, c0_, pieces_, rows_, bytes_, period_, stride_;
};

constexpr int64_t block_positions = 256;

#ifdef __AMX_BF16__
// The block of g_n of bfloat16 tokens, on tiles; `buffer` as for gradient_block.
inline void gradient_tiles(float* g, const Rows& a, const Rows& delta, int64_t first, int64_t positions, Block b,
                           float* buffer) {
    int64_t outputs = b.o1 - b.o0, inputs = b.i1 - b.i0;
    _tile_loadconfig(&tile_config);
    for (int64_t t = 0; t < positions; t += block_positions) {
        int64_t depth = least(block_positions, positions - t), steps = ceil_div(depth, step);
        TokenTiles x{reinterpret_cast<uint16_t*>(buffer), ceil_div(inputs, tile_block), steps};
        TokenTiles packed{x.at(x.blocks, 0), ceil_div(outputs, tile_block), steps};
        TokenTiles d{packed.at(packed.blocks, 0), packed.blocks, steps};
        for (int64_t s = 0; s < steps; ++s) {
            int64_t count = least(step, depth - s * step);
            pack_right(x, s, a, first + t + s * step, count, b.i0);
            pack_right(packed, s, delta, first + t + s * step, count, b.o0);
        }
        left_from_right(d.data, packed.data, packed.blocks * steps * 2);
        auto take = [&](const Tile<float>& tile, int64_t i, int64_t j) {
            for (int r = 0; r < tile_rows && i < outputs; ++r) {
                for (int v = 0; v < tile.vectors; ++v) {
                    float* at = g + (i + r) * b.stride + j + v * Lanes<float>::width;
                    store(at, t > 0 ? load(at) + tile.acc[r][v] : tile.acc[r][v]);
                }
            }
        };
        for (int64_t i = 0; i < d.blocks; ++i) {
            for (int64_t j = 0; j < x.blocks; ++j)
                multiply_blocks(d.at(i, 0), i * tile_block, x.at(j, 0), j * tile_block, steps, take);
        }
    }
    _tile_release();
}
#endif

// The block of g_n in `g` from tokens packed as E, into `buffer` up to block_positions at a time. The positions from
// `next` on are fetched meanwhile.
template <class E, class T>
void gradient_panels(T* g, const Rows& a, const Rows& delta, int64_t first, int64_t positions, Block b, E* buffer,
                     int64_t next) {
    constexpr int64_t W = Panels<E>::width;
    int64_t outputs = b.o1 - b.o0, inputs = b.i1 - b.i0;
    for (int64_t t = 0; t < positions; t += block_positions) {
        int64_t count = least(block_positions, positions - t), depth = Packed<E>::depth(count);
        Panels<E> d{buffer, depth, outputs}, x{buffer + Panels<E>::size(depth, outputs), depth, inputs};
        Packed<E>::pack(d, delta, first + t, count, 0, depth, b.o0);
        Packed<E>::pack(x, a, first + t, count, 0, depth, b.i0);
        int64_t tiles = x.count() * ceil_div(outputs, tile_rows), tile = 0;
        int64_t tiles_a = most(1, tiles * inputs / (inputs + outputs)), tiles_delta = most(1, tiles - tiles_a);
        SharedFetch next_a(a, next + t, count, b.i0, b.i1, tiles_a, depth);
        SharedFetch next_delta(delta, next + t, count, b.o0, b.o1, tiles_delta, depth);
        for (int64_t p = 0; p < x.count(); ++p) {
            for (int64_t i = 0; i < outputs; i += tile_rows, ++tile) {
                Ahead ahead = tile < tiles_a ? next_a.of_tile(tile) : next_delta.of_tile(tile - tiles_a);
                Into<T> target{g + i * b.stride + p * W, b.stride, t > 0};
                multiply<E>(target, d, i, x, p, 0, depth, ahead);
            }
        }
    }
}

#ifdef __AVX512VNNI__
constexpr int64_t least_depth = 32;  // of a product that is worth reading in fixed point

// Numbers that a block of gradients needs for that beside its packed tokens.
inline int64_t fixed_size(int64_t positions, int64_t outputs, int64_t inputs) {
    int64_t depth = least(positions, 2 * block_pairs);
    return FixedPanels::size(1, depth, outputs) + FixedPanels::size(1, depth, inputs);
}

// The block of g_n in fixed point; false where a token cannot be read so.
inline bool gradient_fixed(float* g, const Rows& a, const Rows& delta, int64_t first, int64_t positions, Block b,
                           float* buffer, float* memory, int64_t next) {
    int64_t outputs = b.o1 - b.o0, inputs = b.i1 - b.i0;
    for (int64_t t = 0; t < positions; t += 2 * block_pairs) {
        int64_t count = least(2 * block_pairs, positions - t);
        float* rest = memory;
        auto take = [&](const Rows& rows, int64_t columns, int64_t first_column, bool& readable) {
            FixedPanels fixed(rest, 1, count, columns);
            rest += FixedPanels::size(1, count, columns);
            Panels<float> plain{buffer, count, columns};
            pack_straight(plain, rows, first + t, 0, count, first_column);
            for (int64_t p = 0; p < plain.count(); ++p)
                readable = fixed.fill(0, 0, p, plain.at(0, p * fixed_width)) && readable;
            return fixed;
        };
        bool readable = true;
        FixedPanels d = take(delta, outputs, b.o0, readable), x = take(a, inputs, b.i0, readable);
        if (!readable) return false;
        int64_t depth = x.blocks.pairs, panels = x.words.count(), tiles = panels * ceil_div(outputs, tile_rows),
                tile = 0;
        int64_t tiles_a = most(1, tiles * inputs / (inputs + outputs)), tiles_delta = most(1, tiles - tiles_a);
        SharedFetch next_a(a, next + t, count, b.i0, b.i1, tiles_a, depth);
        SharedFetch next_delta(delta, next + t, count, b.o0, b.o1, tiles_delta, depth);
        for (int64_t p = 0; p < panels; ++p) {
            for (int64_t i = 0; i < outputs; i += tile_rows, ++tile) {
                Ahead ahead = tile < tiles_a ? next_a.of_tile(tile) : next_delta.of_tile(tile - tiles_a);
                IntoScaledRows target{g + i * b.stride + p * fixed_width, b.stride, d.unit(0, 0, i),
                                      x.unit(0, 0, p * fixed_width), t > 0};
                multiply<Words>(target, d.words, i, x.words, p, 0, depth, ahead);
            }
        }
    }
    return true;
}
#endif

// `fixed`: memory for fixed point, or null where it is not wanted.
template <class T>
void gradient_block(T* g, const Rows& a, const Rows& delta, int64_t first, int64_t positions, Block b, T* buffer,
                    T* fixed, int64_t next) {
#ifdef __AVX512BF16__
    if constexpr (sizeof(T) == sizeof(float)) {
        bool bf16 = a.dtype == DType::bf16 && delta.dtype == DType::bf16;
#ifdef __AMX_BF16__
        bool padded = positions < step / 2;  // tiles would be
        if (bf16 && !padded) return gradient_tiles(g, a, delta, first, positions, b, buffer);
#else
        if (bf16 && positions > 1)
            return gradient_panels(g, a, delta, first, positions, b, reinterpret_cast<Pair*>(buffer), next);
#endif
    }
#endif
#ifdef __AVX512VNNI__
    if constexpr (sizeof(T) == sizeof(float)) {
        if (fixed != nullptr && gradient_fixed(g, a, delta, first, positions, b, buffer, fixed, next)) return;
    }
#else
    (void)fixed;
#endif
    gradient_panels(g, a, delta, first, positions, b, buffer, next);
}

constexpr int64_t most_parts = 8;  // whose sums are kept apart: their order does not follow the threads

struct BlockShape {
    int64_t outputs, inputs, count;
};

// A block of g of block_side^2 elements: square where the tokens, packed once for each block of their columns, cost the
// most; of few outputs where P does, whose rows are then read in long pieces. Smaller until there are enough of them,
// counted, where P is little, with the chunks of examples.
inline BlockShape shape_blocks(const Group& group, int64_t queries, int64_t positions, int64_t chunks) {
    constexpr int64_t least_outputs = 3 * tile_rows;
    int64_t most_outputs = 0, most_inputs = 0, part = positions <= 2 * queries ? 4 : positions <= 4 * queries ? 2 : 1;
    for (int64_t layer = 0; layer < group.layers; ++layer) {
        most_outputs = most(most_outputs, group.outputs(layer));
        most_inputs = most(most_inputs, group.inputs(layer));
    }
    for (BlockShape b{block_side / part, block_side * part, 0};;) {
        b.count = 0;
        for (int64_t layer = 0; layer < group.layers; ++layer)
            b.count += ceil_div(group.outputs(layer), b.outputs) * ceil_div(group.inputs(layer), b.inputs);
        bool few = b.count * (part > 1 ? 1 : chunks) < most_parts;
        if (b.inputs > block_side && (few || b.inputs / 2 >= most_inputs)) {
            b.inputs /= 2;
        } else if (b.outputs > least_outputs && (few || b.outputs / 2 >= most_outputs)) {
            b.outputs /= 2;
        } else {
            return b;
        }
    }
}

// sums[q,n] += <P[q], g_n> over a block, for `count` examples that lie `size` apart and are followed by zeros up to
// whole tiles. Some rows at a time: their part of g stays in the L2 cache. P is taken a tile's queries at a time: a row
// of many queries may lie in the same few sets of the caches.
template <class T>
void add_dots(T* sums, int64_t stride_sums, const View& P, const T* g, int64_t size, int64_t count, Block b,
              T* buffer) {
    constexpr int lanes = Lanes<T>::width;
    int64_t Q = P.shape[0], inputs = b.i1 - b.i0, width = ceil_div(inputs, lanes) * lanes, tall = dot_length / width;
    int64_t steps = ceil_div(count, dot_examples), groups = ceil_div(Q, dot_queries), tiles = groups * steps;
    int64_t share_q = ceil_div(dot_queries, steps), share_n = ceil_div(steps * dot_examples, tiles);
    for (int64_t o = b.o0; o < b.o1; o += tall) {
        int64_t rows = least(tall, b.o1 - o), tile = 0;
        for (int64_t q = 0; q < Q; q += dot_queries) {
            auto lying = [&](int64_t query, int64_t row) -> const T* {
                bool whole = inputs == width && Q - query >= dot_queries && row < b.o1;
                return whole ? lying_piece<T>(matrix_rows(entry(P, query)), row, b.i0, b.i1) : nullptr;
            };
            Several<T> left{lying(q, o), P.stride[0], P.stride[1]};
            if (left.data == nullptr) {
                left = {buffer, dot_length, width};
                for (int64_t e = 0; e < dot_queries; ++e) {
                    Rows query = matrix_rows(entry(P, least(q + e, Q - 1)));
                    for (int64_t r = 0; r < rows; ++r) {
                        T* row = buffer + e * left.next + r * left.stride;
                        if (q + e < Q) query.read(row, o + r, b.i0, b.i1);
                        for (int64_t c = q + e < Q ? inputs : 0; c < width; ++c) row[c] = 0;
                    }
                }
            }
            bool last = q + dot_queries >= Q;
            const T* next = lying(last ? 0 : q + dot_queries, last ? o + tall : o);
            for (int64_t n = 0; n < count; n += dot_examples, ++tile) {
                int64_t query = n / dot_examples * share_q, example = tile * share_n;
                Several<T> next_P, next_g, right{g + n * size + (o - b.o0) * b.stride, size, b.stride};
                if (next != nullptr && query < dot_queries)
                    next_P = {next + query * P.stride[0], P.stride[0], P.stride[1],
                              least(share_q, dot_queries - query)};
                if (o + tall < b.o1 && example < count) {
                    next_g = {g + example * size + (o + tall - b.o0) * b.stride, size, b.stride,
                              least(share_n, count - example)};
                }
                dot_tile(sums + q * stride_sums + n * lanes, stride_sums, left, right, rows, width, next_P, next_g);
            }
        }
    }
}

template <class T>
Status gradient_first(const View& out, const Group& group, Precision precision, int threads) {
    constexpr int lanes = Lanes<T>::width;
    constexpr int64_t most_examples = 6 * dot_examples;  // of a block: P is read once for so many
    static_assert(block_side % Panels<T>::width == 0 && 4 * block_side <= dot_length, "whole tiles");
    int64_t Q = group.P[0].shape[0], N = group.a[0].shape[0], positions = group.a[0].shape[1];
    int64_t most_chunks = ceil_div(most(N, 1), dot_examples);
    BlockShape blocks = shape_blocks(group, Q, positions, most_chunks);
    int64_t parts = least(blocks.count, most_parts), size = blocks.outputs * blocks.inputs + apart;
    // Where the blocks are few, chunks of fewer examples are taken at the same time.
    int64_t chunks = least(ceil_div(most_parts, most(parts, 1)), most_chunks);
    int64_t equal = chunk_of_examples(N, 1, most(dot_examples, most_examples / chunks));
    int64_t rows_n = ceil_div(equal, dot_examples) * dot_examples, examples = rows_n;
    int64_t rows_q = ceil_div(Q, dot_queries) * dot_queries, size_sums = rows_q * rows_n * lanes;
    int64_t depth = ceil_div(least(positions, block_positions), 32) * 32;  // whole steps of tiles
    int64_t size_tokens = Panels<T>::size(depth, blocks.outputs) + Panels<T>::size(depth, blocks.inputs);
    int64_t size_queries = dot_queries * dot_length;
    int64_t size_fixed = 0;
#ifdef __AVX512VNNI__
    if (sizeof(T) == sizeof(float) && precision == Precision::int16 && positions >= least_depth)
        size_fixed = fixed_size(positions, blocks.outputs, blocks.inputs);
#else
    (void)precision;
#endif
    int64_t own = rows_n * size + size_tokens + size_queries + size_fixed;
    Workspace space;
    space.plan<T>(threads * own);
    space.plan<T>(chunks * parts * size_sums);
    if (!space.allocate()) return Status::out_of_memory;
    T* scratch = space.take<T>(threads * own);
    T* sums = space.take<T>(chunks * parts * size_sums);
    T* result = static_cast<T*>(out.data);
    for (int64_t start = 0; start < N; start += chunks * examples) {
        parallel(threads, chunks * parts, [&](int64_t task, int thread) {
            int64_t part = task % parts, first = start + task / parts * examples, count = least(examples, N - first);
            if (count <= 0) return;
            int64_t padded = ceil_div(count, dot_examples) * dot_examples;
            T* g = scratch + thread * own;
            T* tokens = g + rows_n * size;
            T* queries = tokens + size_tokens;
            T* fixed = size_fixed > 0 ? queries + size_queries : nullptr;
            T* sum = sums + task * size_sums;
            for (int64_t e = 0; e < size_sums; ++e) sum[e] = 0;
            for (int64_t e = count * size; e < padded * size; ++e) g[e] = 0;
            auto add_block = [&](const View& P, const Rows& a, const Rows& delta, Block b) {
                for (int64_t n = 0; n < count; ++n) {
                    int64_t position = (first + n) * positions;
                    gradient_block(g + n * size, a, delta, position, positions, b, tokens, fixed, position + positions);
                }
                add_dots(sum, rows_n * lanes, P, g, size, count, b, queries);
            };
            int64_t index = 0;
            for (int64_t layer = 0; layer < group.layers; ++layer) {
                int64_t O = group.outputs(layer), I = group.inputs(layer);
                Rows a = token_rows(group.a[layer], group.mask, group.bias);
                Rows delta = token_rows(group.delta[layer], group.mask, false);
                for (int64_t o = 0; o < O; o += blocks.outputs) {
                    for (int64_t i = 0; i < I; i += blocks.inputs) {
                        if (index++ % parts != part) continue;
                        add_block(group.P[layer], a, delta,
                                  {o, least(O, o + blocks.outputs), i, least(I, i + blocks.inputs), blocks.inputs});
                    }
                }
            }
        });
        int64_t end = least(N, start + chunks * examples);
        for (int64_t q = 0; q < Q; ++q) {
            for (int64_t n = start; n < end; ++n) {
                int64_t task = (n - start) / examples * parts, row = (n - start) % examples;
                Vec<T> total = {};
                for (int64_t part = 0; part < parts; ++part)
                    total += load(sums + (task + part) * size_sums + (q * rows_n + row) * lanes);
                result[q * out.stride[0] + n * out.stride[1]] = sum_lanes<T>(total);
            }
        }
    }
    return Status::ok;
}

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp
