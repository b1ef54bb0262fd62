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
    space.plan<T>(basis_size<T>(U, d));
    space.plan<T>(threads * task_size<T>(d));
    if (!space.allocate()) return Status::out_of_memory;
    Panels<T> basis = pack_basis<T>(space, U, d, false, threads);
    T* scratch = space.take<T>(threads * task_size<T>(d));
    int64_t height = rows_of_a_task<T>(rows.count, threads);
    parallel(threads, ceil_div(rows.count, height), [&](int64_t block, int thread) {
        int64_t first = block * height;
        // out is made by the binding: contiguous, (N,T,d) read as (N T, d).
        StoreMatrix<T, T, false> finish{static_cast<T*>(out.data) + first * d, rows.count - first, d, d, 1};
        multiply_rows(rows, first, least(height, rows.count - first), basis, scratch + thread * task_size<T>(d),
                      finish);
    });
    return Status::ok;
}

}  // namespace

Status eigenbasis_project(View out, View x, View U, View mask, bool bias, int threads) {
    return IHVP_COMPUTE(out.dtype == DType::f64,
                        [&](auto zero) { return run<decltype(zero)>(out, x, U, mask, bias, threads); });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
