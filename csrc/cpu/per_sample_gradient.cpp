// g[n] = sum_t delta[n,t] a[n,t]^T, one product an example. Many examples are shared out among the threads; of few,
// each product is.
#include "epilogue.h"

namespace ihvp {
namespace IHVP_ISA {

namespace {

constexpr int64_t chunk_positions = 1024;

template <class T>
Status run(const View& out, const Rows& a, const Rows& delta, int64_t N, int64_t positions, int threads) {
    int64_t I = a.features, O = delta.features, depth = least(positions, chunk_positions);
    bool shared = N < 2 * threads;
    int outer = shared ? 1 : threads, inner = shared ? threads : 1;
    int64_t size_x = Panels<T>::size(depth, I), own = size_x + Panels<T>::size(depth, O);
    Workspace space;
    space.plan<T>(outer * own);
    if (!space.allocate()) return Status::out_of_memory;
    T* scratch = space.take<T>(outer * own);
    parallel(outer, N, [&](int64_t n, int thread) {
        View g = entry(out, n);
        for (int64_t t = 0; t < positions; t += depth) {
            int64_t count = least(depth, positions - t);
            Panels<T> x{scratch + thread * own, count, I}, d{scratch + thread * own + size_x, count, O};
            pack_straight(x, a, n * positions + t, inner);
            pack_straight(d, delta, n * positions + t, inner);
            if (t == 0) {
                product(d, x, inner, matrix_target<T, T, false>(g));
            } else {
                product(d, x, inner, matrix_target<T, T, true>(g));
            }
        }
    });
    return Status::ok;
}

}  // namespace

Status per_sample_gradient(View out, View a, View delta, View mask, bool bias, int threads) {
    return IHVP_COMPUTE(out.dtype == DType::f64, [&](auto zero) {
        return run<decltype(zero)>(out, token_rows(a, mask, bias), token_rows(delta, mask, false), a.shape[0],
                                   a.shape[1], threads);
    });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
