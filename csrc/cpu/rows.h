// Reading: a View of any element type and strides as rows of float or double, with the mask and the implicit
// bias feature folded in.
#pragma once
#include <cstring>

#include "vec.h"

namespace ihvp {
namespace IHVP_ISA {
namespace {

template <class T, class S>
IHVP_INLINE T widen(S x) {
    return T(x);
}

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

IHVP_INLINE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <class T>
IHVP_INLINE T widen(BFloat16 x) {
    return T(from_bits(uint32_t(x.bits) << 16));
}

// Exponents 0 (zeros, subnormals) and 31 (infinities, NaN) need their own way; the rest is a shift and a rebias.
template <class T>
IHVP_INLINE T widen(Float16 x) {
    uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    float normal = from_bits(sign | ((rest << 13) + (112u << 23)));
    float special = from_bits(sign | (rest << 13) | 0x7f800000u);
    float small = from_bits(sign | 0x3f800000u) * (float(rest) * 0x1p-24f);
    return T(rest >= 0x7c00u ? special : rest < 0x0400u ? small : normal);
}

template <class T, class S>
void widen_row(T* __restrict out, const S* in, int64_t stride, int64_t count) {
    if (stride == 1) {
        for (int64_t i = 0; i < count; ++i) out[i] = widen<T>(in[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = widen<T>(in[i * stride]);
    }
}

inline int64_t element_size(DType dtype) {
    constexpr int64_t sizes[] = {4, 8, 2, 2, 1};
    return sizes[int(dtype)];
}

// A matrix as its rows. For tokens (N,T,features) a row is a position and `features` counts the bias feature;
// for a matrix (rows, columns) there is one outer index.
struct Rows {
    const char* data;
    DType dtype;
    int64_t inner, stride_outer, stride_inner, stride_column;  // row r lies at outer r / inner, inner r % inner
    int64_t count, features, stored;                           // stored = features without the bias
    const bool* mask;
    int64_t mask_outer, mask_inner;

    // out = columns first..end of a row, as T.
    template <class T>
    void read(T* out, int64_t row, int64_t first, int64_t end) const {
        int64_t outer = row < inner ? 0 : row / inner, within = row - outer * inner;  // a matrix needs no division
        if (mask != nullptr && !mask[outer * mask_outer + within * mask_inner]) {
            for (int64_t i = first; i < end; ++i) *out++ = 0;
            return;
        }
        int64_t at = outer * stride_outer + within * stride_inner + first * stride_column;
        int64_t count_stored = least(end, stored) - first;
        switch (dtype) {
            case DType::f32:
                widen_row<T>(out, reinterpret_cast<const float*>(data) + at, stride_column, count_stored);
                break;
            case DType::f64:
                widen_row<T>(out, reinterpret_cast<const double*>(data) + at, stride_column, count_stored);
                break;
            case DType::bf16:
                widen_row<T>(out, reinterpret_cast<const BFloat16*>(data) + at, stride_column, count_stored);
                break;
            case DType::f16:
                widen_row<T>(out, reinterpret_cast<const Float16*>(data) + at, stride_column, count_stored);
                break;
            case DType::boolean:
            case DType::i64:
                break;
        }
        if (end > stored && first <= stored) out[stored - first] = 1;
    }
};

inline Rows matrix_rows(const View& m, bool transposed = false) {
    int64_t r = m.dims - 2, c = m.dims - 1;
    if (transposed) {
        int64_t swap = r;
        r = c;
        c = swap;
    }
    int64_t rows = m.shape[r], columns = m.shape[c];
    return Rows{static_cast<const char*>(m.data),
                m.dtype,
                rows > 0 ? rows : 1,
                0,
                m.stride[r],
                m.stride[c],
                rows,
                columns,
                columns,
                nullptr,
                0,
                0};
}

// Where a row's columns lie from `column` on when they lie together, of whatever type.
inline const char* place(const Rows& m, int64_t row, int64_t column) {
    if (m.stride_column != 1 || row >= m.count) return nullptr;
    int64_t outer = row < m.inner ? 0 : row / m.inner, within = row - outer * m.inner;
    return m.data + (outer * m.stride_outer + within * m.stride_inner + column) * element_size(m.dtype);
}

// Columns first..end of one row where they can be used as they lie: of type T, in one piece, not masked.
template <class T>
inline const T* lying_piece(const Rows& m, int64_t row, int64_t first, int64_t end) {
    constexpr DType own = sizeof(T) == sizeof(double) ? DType::f64 : DType::f32;
    if (m.dtype != own || end > m.stored) return nullptr;
    if (m.mask != nullptr && !m.mask[row / m.inner * m.mask_outer + row % m.inner * m.mask_inner]) return nullptr;
    return reinterpret_cast<const T*>(place(m, row, first));
}

// A whole row, where all rows can be used so.
template <class T>
inline const T* lying_row(const Rows& m, int64_t row) {
    return m.mask == nullptr ? lying_piece<T>(m, row, 0, m.features) : nullptr;
}

// From one row to the next, or 0 where the rows are not evenly spaced.
inline int64_t row_stride(const Rows& m) {
    if (m.inner == 1) return m.stride_outer;
    return m.inner >= m.count || m.stride_outer == m.inner * m.stride_inner ? m.stride_inner : 0;
}

// A matrix in which the rows lie next to each other, as the eigenvectors of LAPACK do: it is read by its columns.
inline bool lies_by_columns(const Rows& m) {
    return m.stride_column != 1 && m.stride_inner == 1 && m.inner >= m.count && m.stored == m.features &&
           m.mask == nullptr;
}

// The same memory from row `first_row` on, rows and columns exchanged.
inline Rows exchanged(const Rows& m, int64_t first_row) {
    Rows r = m;
    r.data = m.data + first_row * m.stride_inner * element_size(m.dtype);
    r.stride_inner = m.stride_column;
    r.stride_column = m.stride_inner;
    r.count = r.inner = m.features;
    r.features = r.stored = m.count - first_row;
    return r;
}

inline Rows token_rows(const View& x, const View& mask, bool bias) {
    int64_t inner = x.shape[1] > 0 ? x.shape[1] : 1;
    return Rows{static_cast<const char*>(x.data),
                x.dtype,
                inner,
                x.stride[0],
                x.stride[1],
                x.stride[2],
                x.shape[0] * x.shape[1],
                x.shape[2] + (bias ? 1 : 0),
                x.shape[2],
                static_cast<const bool*>(mask.data),
                mask.stride[0],
                mask.stride[1]};
}

// One entry of a batch of matrices.
inline View entry(const View& m, int64_t index) {
    View v = m;
    v.dims = m.dims - 1;
    v.data = static_cast<char*>(m.data) + index * m.stride[0] * element_size(m.dtype);
    for (int i = 0; i < v.dims; ++i) {
        v.shape[i] = m.shape[i + 1];
        v.stride[i] = m.stride[i + 1];
    }
    return v;
}

}  // namespace
}  // namespace IHVP_ISA
}  // namespace ihvp
