// S[q,n] = sum over layers, positions of delta[n,t]^T P[q] a[n,t]: many small layers in one parallel region.
#include "gradient_first.h"

namespace ihvp {
namespace IHVP_ISA {

Status gradient_dot_grouped(View out, const View* P, const View* a, const View* delta, int64_t layers, View mask,
                            bool bias, int threads) {
    Group group{P, a, delta, mask, bias, layers};
    return IHVP_COMPUTE(out.dtype == DType::f64, [&](auto zero) {
        return gradient_first<decltype(zero)>(out, group, Precision::float32, threads);
    });
}

}  // namespace IHVP_ISA
}  // namespace ihvp
