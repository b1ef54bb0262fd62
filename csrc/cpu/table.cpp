// This instruction set's column of the table of kernels.
#include "vec.h"

#define IHVP_TEXT_(x) #x
#define IHVP_TEXT(x) IHVP_TEXT_(x)

namespace ihvp {
namespace IHVP_ISA {

Status covariance_update(View, View, View, bool, Precision, int);
Status eigenbasis_project(View, View, View, View, bool, int);
Status eigenbasis_rotate(View, View, View, View, bool, int);
Status ekfac_diagonal_update(View, View, View, View, View, View, bool, Order, Precision, int);
Status ekfac_self_influence(View, View, View, View, View, View, double, View, bool, int);
Status ekfac_solve(View, View, View, View, View, const double*, int);
Status weighted_ghost_dot(View, View, View, View, View, View, View, View, bool, Precision, int);
Status gradient_dot(View, View, View, View, View, bool, bool, Order, Precision, int);
Status gradient_dot_grouped(View, const View*, const View*, const View*, int64_t, View, bool, int);
Status kfac_solve(View, View, View, View, int);
Status ghost_dot(View, View, View, View, View, View, View, bool, bool, bool, int);
Status ghost_norm(View, View, View, View, bool, int);
Status per_sample_gradient(View, View, View, View, bool, int);
int64_t peak(double*, bool, double, double, int64_t, int);

extern const Kernels kernels;
const Kernels kernels = {IHVP_TEXT(IHVP_ISA),
                         covariance_update,
                         eigenbasis_project,
                         eigenbasis_rotate,
                         ekfac_diagonal_update,
                         ekfac_self_influence,
                         ekfac_solve,
                         weighted_ghost_dot,
                         gradient_dot,
                         gradient_dot_grouped,
                         kfac_solve,
                         ghost_dot,
                         ghost_norm,
                         per_sample_gradient,
                         peak,
                         nullptr};

}  // namespace IHVP_ISA
}  // namespace ihvp
