// out[q] = U_G^T V[q] U_A, or with `inverse` out[q] = U_G V[q] U_A^T.
#include "eigenbasis.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

template <class T>
Status run(const View& out, const View& V, const View& U_A, const View& U_G, bool inverse, int threads) {
    int64_t Q = V.shape[0], O = V.shape[1], I = V.shape[2];
    int64_t packed = Left<T>::size(I, O), rotated = Panels<T>::size(O, I);
    Workspace space;
    space.plan<T>(Panels<T>::size(I, I));
    space.plan<T>(Left<T>::size(O, O));
    space.plan<T>(threads * packed);
    space.plan<T>(threads * rotated);
    if (!space.allocate()) return Status::out_of_memory;
    Panels<T> basis_A{space.take<T>(Panels<T>::size(I, I)), I, I};
    Left<T> basis_G{space.take<T>(Left<T>::size(O, O)), O, O};
    pack_straight(basis_A, matrix_rows(U_A, inverse), 0, threads);
    pack_straight(basis_G, matrix_rows(U_G, inverse), 0, threads);
    T* scratch = space.take<T>(threads * packed);
    T* half = space.take<T>(threads * rotated);
    parallel(threads, Q, [&](int64_t q, int thread) {
        Left<T> v{scratch + thread * packed, I, O};
        Panels<T> x{half + thread * rotated, O, I};
        Rows rows = matrix_rows(entry(V, q));
        for (int64_t u = 0; u < v.units(); ++u) pack_transposed(v, u, rows, 0);
        product(v, 0, O, basis_A, 0, basis_A.count(), StorePanels<T, false>{x});             // V U_A: k = o
        product(basis_G, 0, O, x, 0, x.count(), matrix_target<T, T, false>(entry(out, q)));  // U_G^T V U_A
    });
    return Status::ok;
}

}  // namespace

Status eigenbasis_rotate(View out, View V, View U_A, View U_G, bool inverse, int threads) {
    return IHVP_COMPUTE(out.dtype == DType::f64,
                        [&](auto zero) { return run<decltype(zero)>(out, V, U_A, U_G, inverse, threads); });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
