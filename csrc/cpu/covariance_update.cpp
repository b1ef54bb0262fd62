// C += sum over real positions of x x^T: the tiles on and above the diagonal, each added to its mirror image too.
#include "amx.h"
#include "epilogue.h"
#include "fixed_point.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

// Positions summed in T before they are added to C, which may be wider.
constexpr int64_t chunk_positions = 1024;

// Adds a tile and the mirror image of what lies above the squares on the diagonal, which hold their own.
template <class T, class S, int64_t square>
struct AddMirrored {
    StoreMatrix<T, S, true> upper, lower;

    IHVP_INLINE void operator()(const Tile<T>& tile, int64_t i, int64_t j) const {
        constexpr int lanes = Lanes<T>::width;
        upper(tile, i, j);
        if (i / square < j / square) return lower(tile, i, j);
        int64_t own = ((i / square + 1) * square - j) / lanes;
        if (own >= tile.vectors) return;
        Tile<T> rest;
        rest.vectors = tile.vectors - int(own);
        for (int r = 0; r < tile_rows; ++r) {
            for (int v = 0; v < rest.vectors; ++v) rest.acc[r][v] = tile.acc[r][own + v];
        }
        lower(rest, i, j + own * lanes);
    }
    IHVP_INLINE void fetch(int64_t i, int64_t j) const {
        upper.fetch(i, j);
        if (i / square < j / square) lower.fetch(i, j);
    }
};

template <class T, class S, int64_t square>
AddMirrored<T, S, square> add_mirrored(const View& C) {
    View mirror = C;
    mirror.stride[0] = C.stride[1];
    mirror.stride[1] = C.stride[0];
    return {matrix_target<T, S, true>(C), matrix_target<T, S, true>(mirror)};
}

// The positions begin..end, packed as E: one by one, or by pairs.
template <class E, class S>
Status update(const View& C, const Rows& rows, int64_t begin, int64_t end, int threads) {
    constexpr int64_t own = 64;  // rows of a packing task
    int64_t d = rows.features, most_rows = Packed<E>::depth(least(chunk_positions, end - begin));
    Workspace space;
    space.plan<E>(Panels<E>::size(most_rows, d));
    if (!space.allocate()) return Status::out_of_memory;
    E* memory = space.take<E>(Panels<E>::size(most_rows, d));

    auto add = add_mirrored<Sum<E>, S, triangle_unit<E>>(C);
    for (int64_t first = begin; first < end; first += chunk_positions) {
        int64_t count = least(chunk_positions, end - first);
        Panels<E> packed{memory, Packed<E>::depth(count), d};
        parallel(threads, ceil_div(packed.depth, own), [&](int64_t task, int) {
            Packed<E>::pack(packed, rows, first, count, task * own, least(packed.depth, (task + 1) * own));
        });
        product_triangle(packed, threads, add);
    }
    return Status::ok;
}

#ifdef __AVX512VNNI__
// In fixed point; positions that cannot be read so, as they are.
template <class S>
Status update_fixed(const View& C, const Rows& rows, int threads) {
    int64_t d = rows.features, longest = least(chunk_positions, rows.count),
            own = Panels<float>::size(2 * block_pairs, d);
    Workspace space;
    space.plan<float>(FixedPanels::size(1, longest, d));
    space.plan<float>(threads * own);
    if (!space.allocate()) return Status::out_of_memory;
    float* memory = space.take<float>(FixedPanels::size(1, longest, d));
    float* scratch = space.take<float>(threads * own);

    auto add = add_mirrored<float, S, triangle_unit<float>>(C);
    for (int64_t first = 0; first < rows.count; first += chunk_positions) {
        int64_t count = least(chunk_positions, rows.count - first);
        FixedPanels x(memory, 1, count, d);
        Readable readable;
        parallel(threads, x.blocks.count, [&](int64_t b, int thread) {
            int64_t k0 = x.blocks.begin(b), k1 = x.blocks.end(b);
            Panels<float> plain{scratch + thread * own, k1 - k0, d};
            pack_straight(plain, rows, first + k0, 0, k1 - k0);
            for (int64_t p = 0; p < plain.count(); ++p) readable.note(x.fill(0, b, p, plain.at(0, p * fixed_width)));
        });
        if (!readable) {
            Status status = update<float, S>(C, rows, first, first + count, threads);
            if (status != Status::ok) return status;
            continue;
        }
        auto tile_of = [&](int64_t i, int64_t p, Ahead ahead, int64_t skipped) {
            Tile<float> tile = {};
            add_product(tile, x, i, x, p, 0, ahead, skipped);
            return tile;
        };
        product_triangle(x.words, threads, tile_of, add);
    }
    return Status::ok;
}
#endif

#ifdef __AMX_BF16__
// bfloat16 tokens as they are, on tiles.
template <class S>
Status update_tiles(const View& C, const Rows& rows, int threads) {
    constexpr int64_t chunk = 2 * chunk_positions;  // of half the bytes
    constexpr int64_t group = 4;                    // blocks of both sides that lie in the L2 cache together
    int64_t blocks = ceil_div(rows.features, tile_block), most_steps = ceil_div(least(chunk, rows.count), step);
    int64_t groups = ceil_div(blocks, group);
    int64_t size = blocks * most_steps * 2 * tile_elements;
    Workspace space;
    space.plan<uint16_t>(2 * size + 2 * tile_elements);  // one step more, which is fetched only
    if (!space.allocate()) return Status::out_of_memory;
    uint16_t* memory = space.take<uint16_t>(2 * size + 2 * tile_elements);
    auto add = add_mirrored<float, S, tile_block>(C);
    for (int64_t first = 0; first < rows.count; first += chunk) {
        int64_t count = least(chunk, rows.count - first), steps = ceil_div(count, step);
        TokenTiles left{memory, blocks, steps}, right{memory + size, blocks, steps};
        parallel(threads, steps, [&](int64_t s, int) {
            pack_right(right, s, rows, first + s * step, least(step, count - s * step));
            for (int64_t block = 0; block < blocks; ++block) left_from_right(left.at(block, s), right.at(block, s), 2);
        });
        parallel(threads, groups * groups, [&](int64_t task, int) {
            int64_t i0 = task / groups * group, j0 = task % groups * group;
            if (j0 < i0) return;
            _tile_loadconfig(&tile_config);
            for (int64_t i = i0; i < least(blocks, i0 + group); ++i) {
                for (int64_t j = most(i, j0); j < least(blocks, j0 + group); ++j)
                    multiply_blocks(left.at(i, 0), i * tile_block, right.at(j, 0), j * tile_block, steps, add);
            }
            _tile_release();
        });
    }
    return Status::ok;
}
#endif

}  // namespace

Status covariance_update(View C, View x, View mask, bool bias, Precision precision, int threads) {
    Rows rows = token_rows(x, mask, bias);
    bool wide = C.dtype == DType::f64;
#ifdef __AVX512BF16__
    if (x.dtype == DType::bf16) {
#ifdef __AMX_BF16__
        bool filled = rows.features >= tile_block && rows.count >= step;  // smaller, tiles would be mostly padding
        if (filled) return wide ? update_tiles<double>(C, rows, threads) : update_tiles<float>(C, rows, threads);
#else
        auto run = wide ? update<Pair, double> : update<Pair, float>;
        return run(C, rows, 0, rows.count, threads);
#endif
    }
#endif
#ifdef __AVX512VNNI__
    if (precision == Precision::int16 && x.dtype != DType::f64)
        return wide ? update_fixed<double>(C, rows, threads) : update_fixed<float>(C, rows, threads);
#else
    (void)precision;
#endif
    auto run = x.dtype == DType::f64 ? update<double, double> : wide ? update<float, double> : update<float, float>;
    return run(C, rows, 0, rows.count, threads);
}

}  // namespace IHVP_ISA
}  // namespace ihvp
