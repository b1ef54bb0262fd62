// out[n,t,c] = sum_i x[n,t,i] U[i,c], the bias feature of x folded in; masked positions give zero rows.
#include "eigenbasis.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

template <class T>
Status run(const View& out, const View& x, const View& U, const View& mask, bool bias, int threads) {
    Rows rows = token_rows(x, mask, bias);
    int64_t d = rows.features;
    Workspace space;
    space.plan<T>(basis_size<T>(U, d, rows.count));
    space.plan<T>(scratch_size<T>(d, rows.count, threads));
    if (!space.allocate()) return Status::out_of_memory;
    Basis<T> basis = take_basis<T>(space, U, d, rows.count, threads);
    T* scratch = space.take<T>(scratch_size<T>(d, rows.count, threads));
    // out is made by the binding: contiguous, (N,T,d) read as (N T, d).
    StoreMatrix<T, T, false> finish{static_cast<T*>(out.data), rows.count, d, d, 1};
    multiply_basis(rows, 0, rows.count, basis, scratch, threads, finish);
    return Status::ok;
}

}  // namespace

Status eigenbasis_project(View out, View x, View U, View mask, bool bias, int threads) {
    return IHVP_COMPUTE(out.dtype == DType::f64,
                        [&](auto zero) { return run<decltype(zero)>(out, x, U, mask, bias, threads); });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
