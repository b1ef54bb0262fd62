// C += sum over real positions of x x^T: the tiles on and above the diagonal, each added to its mirror image too.
#include "engine.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

// Positions summed in T before they are added to C, which may be wider.
constexpr int64_t chunk_positions = 1024;

// Adds a tile and its mirror image, which a tile of a block on the diagonal holds itself.
template <class T, class S>
struct AddMirrored {
    StoreMatrix<T, S, true> upper, lower;
    static bool mirrored(int64_t i, int64_t j) { return i / Panels<T>::width < j / Panels<T>::width; }
    IHVP_INLINE void operator()(const Tile<T>& tile, int64_t i, int64_t j) const {
        upper(tile, i, j);
        if (mirrored(i, j)) lower(tile, i, j);
    }
    IHVP_INLINE void fetch(int64_t i, int64_t j) const {
        upper.fetch(i, j);
        if (mirrored(i, j)) lower.fetch(i, j);
    }
};

template <class T, class S>
Status update(const View& C, const View& x, const View& mask, bool bias, int threads) {
    Rows rows = token_rows(x, mask, bias);
    int64_t d = rows.features, depth = least(chunk_positions, rows.count);
    Workspace space;
    space.plan<T>(Panels<T>::size(depth, d));
    if (!space.allocate()) return Status::out_of_memory;
    T* memory = space.take<T>(Panels<T>::size(depth, d));

    View mirror = C;
    mirror.stride[0] = C.stride[1];
    mirror.stride[1] = C.stride[0];
    AddMirrored<T, S> add{matrix_target<T, S, true>(C), matrix_target<T, S, true>(mirror)};
    for (int64_t first = 0; first < rows.count; first += depth) {
        Panels<T> packed{memory, least(depth, rows.count - first), d};
        pack_straight(packed, rows, first, threads);
        product<T, true>(packed, packed, threads, add);
    }
    return Status::ok;
}

}  // namespace

Status covariance_update(View C, View x, View mask, bool bias, int threads) {
    if (x.dtype == DType::f64) return update<double, double>(C, x, mask, bias, threads);
    if (C.dtype == DType::f64) return update<float, double>(C, x, mask, bias, threads);
    return update<float, float>(C, x, mask, bias, threads);
}

}  // namespace IHVP_ISA
}  // namespace ihvp
