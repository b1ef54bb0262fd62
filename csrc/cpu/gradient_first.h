// S[q,n] = sum over layers of <P[q], g_n>: a block of g_n = sum_t delta a^T for some examples, then its dots with that
// block of P; g is never whole, and P is read once for those examples. One layer is a group of one.
#pragma once
#include "amx.h"

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
constexpr int64_t block_side = 192;  // of a square block of g

// The same rows of some queries or examples: `next` elements from one of them to the other.
template <class T>
struct Several {
    const T* data;
    int64_t next, stride;
};

template <class T>
IHVP_INLINE void dot_tile(T* sums, int64_t stride_sums, Several<T> P, Several<T> g, int64_t rows, int64_t columns) {
    constexpr int lanes = Lanes<T>::width;
    Vec<T> acc[dot_queries][dot_examples];
    for (int i = 0; i < dot_queries; ++i) {
        for (int j = 0; j < dot_examples; ++j) acc[i][j] = load(sums + i * stride_sums + j * lanes);
    }
    for (int64_t r = 0; r < rows; ++r) {
        const T* p = P.data + r * P.stride;
        const T* x = g.data + r * g.stride;
        for (int64_t c = 0; c < columns; c += lanes) {
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

// Asks the L2 cache for columns c0..c1 of the rows first..end, where rows can be used as they lie: short pieces of far
// rows, which no hardware prefetcher foresees.
template <class T>
IHVP_INLINE void fetch(const Rows& m, int64_t first, int64_t end, int64_t c0, int64_t c1) {
    for (int64_t row = first; row < end; ++row) {
        const T* data = lying_row<T>(m, row);
        if (data == nullptr) return;
        for (int64_t c = c0; c < c1; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(data + c, 0, 2);
    }
}

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
        int64_t tiles = x.count() * ceil_div(outputs, tile_rows), share = ceil_div(count, tiles), ahead = next + t;
        int64_t ahead_end = least(ahead + count, a.count);
        for (int64_t p = 0; p < x.count(); ++p) {
            for (int64_t i = 0; i < outputs; i += tile_rows, ahead += share) {
                fetch<T>(delta, ahead, least(ahead_end, ahead + share), b.o0, b.o1);
                fetch<T>(a, ahead, least(ahead_end, ahead + share), b.i0, least(a.stored, b.i1));
                T* target = g + i * b.stride + p * W;
                Tile<T> tile;
                if (t > 0) {
                    for (int r = 0; r < tile_rows; ++r) {
                        for (int v = 0; v < tile_vectors; ++v)
                            tile.acc[r][v] = load(target + r * b.stride + v * Lanes<T>::width);
                    }
                }
                multiply(tile, d, i, x, p, 0, depth, t > 0);
                for (int r = 0; r < tile_rows; ++r) {
                    for (int v = 0; v < tile.vectors; ++v)
                        store(target + r * b.stride + v * Lanes<T>::width, tile.acc[r][v]);
                }
            }
        }
    }
}

template <class T>
void gradient_block(T* g, const Rows& a, const Rows& delta, int64_t first, int64_t positions, Block b, T* buffer,
                    int64_t next) {
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
    gradient_panels(g, a, delta, first, positions, b, buffer, next);
}

// A block of g of block_side^2 elements: square where the tokens, packed once for each block of their columns, cost the
// most; of few outputs where P does, whose rows are then read in long pieces; smaller until there are blocks enough.
struct BlockShape {
    int64_t outputs, inputs, count;
};

inline BlockShape shape_blocks(const Group& group, int64_t queries, int64_t positions, int64_t least_count) {
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
        bool few = b.count < least_count;
        if (b.inputs > block_side && (few || b.inputs / 2 >= most_inputs)) {
            b.inputs /= 2;
        } else if (b.outputs > least_outputs && (few || b.outputs / 2 >= most_outputs)) {
            b.outputs /= 2;
        } else {
            return b;
        }
    }
}

template <class T>
Status gradient_first(const View& out, const Group& group, int threads) {
    constexpr int lanes = Lanes<T>::width;
    constexpr int64_t most_examples = 6 * dot_examples;  // of a block: P is read once for so many
    constexpr int64_t most_parts = 8;    // sums kept apart, so that their order does not follow the threads
    constexpr int64_t dot_length = 768;  // of a block's elements at a time: a dot tile's operands stay in the L1 cache
    static_assert(block_side % Panels<T>::width == 0 && 4 * block_side <= dot_length, "whole tiles");
    int64_t Q = group.P[0].shape[0], N = group.a[0].shape[0], positions = group.a[0].shape[1];
    BlockShape blocks = shape_blocks(group, Q, positions, most_parts);
    int64_t parts = least(blocks.count, most_parts), size = blocks.outputs * blocks.inputs;
    int64_t examples = chunk_of_examples(N, 1, most_examples), rows_n = ceil_div(examples, dot_examples) * dot_examples;
    int64_t rows_q = ceil_div(Q, dot_queries) * dot_queries, size_sums = rows_q * rows_n * lanes;
    int64_t depth = ceil_div(least(positions, block_positions), 32) * 32;  // whole steps of tiles
    int64_t size_tokens = Panels<T>::size(depth, blocks.outputs) + Panels<T>::size(depth, blocks.inputs);
    int64_t size_queries = dot_queries * dot_length;
    int64_t own = rows_n * size + size_tokens + size_queries;
    Workspace space;
    space.plan<T>(threads * own);
    space.plan<T>(parts * size_sums);
    if (!space.allocate()) return Status::out_of_memory;
    T* scratch = space.take<T>(threads * own);
    T* sums = space.take<T>(parts * size_sums);
    T* result = static_cast<T*>(out.data);
    for (int64_t first = 0; first < N; first += examples) {
        int64_t count = least(examples, N - first), padded = ceil_div(count, dot_examples) * dot_examples;
        parallel(threads, parts, [&](int64_t part, int thread) {
            T* g = scratch + thread * own;
            T* tokens = g + rows_n * size;
            T* queries = tokens + size_tokens;
            T* sum = sums + part * size_sums;
            for (int64_t e = 0; e < size_sums; ++e) sum[e] = 0;
            for (int64_t e = count * size; e < padded * size; ++e) g[e] = 0;
            auto add_block = [&](const View& P, const Rows& a, const Rows& delta, Block b) {
                int64_t inputs = b.i1 - b.i0, width = ceil_div(inputs, lanes) * lanes;
                for (int64_t n = 0; n < count; ++n) {
                    int64_t position = (first + n) * positions;
                    gradient_block(g + n * size, a, delta, position, positions, b, tokens, position + positions);
                }
                int64_t dot_rows = dot_length / width;
                for (int64_t o = b.o0; o < b.o1; o += dot_rows) {
                    int64_t rows = least(dot_rows, b.o1 - o);
                    for (int64_t q = 0; q < Q; q += dot_queries) {
                        const T* lying = lying_row<T>(matrix_rows(entry(P, q)), o);
                        Several<T> left{queries, dot_length, width};
                        if (lying != nullptr && inputs == width && Q - q >= dot_queries) {
                            left = {lying + b.i0, P.stride[0], P.stride[1]};
                        } else {
                            for (int64_t e = 0; e < dot_queries; ++e) {
                                Rows query = matrix_rows(entry(P, least(q + e, Q - 1)));
                                for (int64_t r = 0; r < rows; ++r) {
                                    T* row = queries + e * left.next + r * left.stride;
                                    if (q + e < Q) query.read(row, o + r, b.i0, b.i1);
                                    for (int64_t c = q + e < Q ? inputs : 0; c < width; ++c) row[c] = 0;
                                }
                            }
                        }
                        for (int64_t n = 0; n < count; n += dot_examples) {
                            int64_t steps = padded / dot_examples, step = n / dot_examples;
                            int64_t next = q + dot_queries + step * dot_queries / steps;
                            int64_t end = q + dot_queries + (step + 1) * dot_queries / steps;
                            for (; next < least(Q, end); ++next)
                                fetch<T>(matrix_rows(entry(P, next)), o, o + rows, b.i0, b.i1);
                            Several<T> right{g + n * size + (o - b.o0) * b.stride, size, b.stride};
                            dot_tile(sum + (q * rows_n + n) * lanes, rows_n * lanes, left, right, rows, width);
                        }
                    }
                }
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
        for (int64_t q = 0; q < Q; ++q) {
            for (int64_t n = 0; n < count; ++n) {
                Vec<T> total = {};
                for (int64_t part = 0; part < parts; ++part)
                    total += load(sums + part * size_sums + (q * rows_n + n) * lanes);
                result[q * out.stride[0] + (first + n) * out.stride[1]] = sum_lanes<T>(total);
            }
        }
    }
    return Status::ok;
}

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp
