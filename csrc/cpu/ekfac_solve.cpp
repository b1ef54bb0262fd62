// out[d,q] = U_G ((U_G^T V[q] U_A) / (Lambda + damping[d])) U_A^T; all dampings share the first two products.
#include "engine.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

template <class T>
Status run(const View& out, const View& V, const View& U_A, const View& U_G, const View& Lambda, const View& damping,
           int threads) {
    int64_t D = damping.shape[0], Q = V.shape[0], O = V.shape[1], I = V.shape[2];
    int64_t by_input = Panels<T>::size(I, O), by_output = Panels<T>::size(O, I);  // k = i, k = o
    Workspace space;
    for (int i = 0; i < 2; ++i) {
        space.plan<T>(Panels<T>::size(I, I));
        space.plan<T>(Panels<T>::size(O, O));
        space.plan<T>(threads * by_input);
    }
    space.plan<T>(by_input);
    space.plan<T>(threads * by_output);
    if (!space.allocate()) return Status::out_of_memory;
    Panels<T> into_A = pack_basis<T>(space, U_A, I, false, threads);
    Panels<T> into_G = pack_basis<T>(space, U_G, O, false, threads);
    Panels<T> back_A = pack_basis<T>(space, U_A, I, true, threads);
    Panels<T> back_G = pack_basis<T>(space, U_G, O, true, threads);
    Panels<T> eigenvalues{space.take<T>(by_input), I, O};
    pack_straight(eigenvalues, matrix_rows(Lambda, true), 0, threads);
    T* first = space.take<T>(threads * by_output);
    T* second = space.take<T>(threads * by_input);
    T* third = space.take<T>(threads * by_input);
    const double* dampings = static_cast<const double*>(damping.data);
    parallel(threads, Q, [&](int64_t q, int thread) {
        Panels<T> x{first + thread * by_output, O, I}, y{second + thread * by_input, I, O},
            z{third + thread * by_input, I, O};
        Rows rows = matrix_rows(entry(V, q));
        for (int64_t p = 0; p < z.count(); ++p) pack_transposed(z, p, rows, 0);
        product(z, 0, O, into_A, 0, into_A.count(), StorePanels<T, false>{x});  // V U_A: k = o
        product(x, 0, I, into_G, 0, into_G.count(), StorePanels<T, false>{y});  // (U_G^T V U_A)^T: k = i
        for (int64_t d = 0; d < D; ++d) {
            T shift = T(dampings[d * damping.stride[0]]);
            // Padding columns are divided too; they never enter a sum over k.
            for (int64_t e = 0; e < by_input; ++e) z.data[e] = y.data[e] / (eigenvalues.data[e] + shift);
            product(z, 0, O, back_A, 0, back_A.count(), StorePanels<T, false>{x});  // k = o'
            product(back_G, 0, O, x, 0, x.count(), matrix_target<T, T, false>(entry(entry(out, d), q)));
        }
    });
    return Status::ok;
}

}  // namespace

Status ekfac_solve(View out, View V, View U_A, View U_G, View Lambda, View damping, int threads) {
    return IHVP_COMPUTE(out.dtype == DType::f64,
                        [&](auto zero) { return run<decltype(zero)>(out, V, U_A, U_G, Lambda, damping, threads); });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
