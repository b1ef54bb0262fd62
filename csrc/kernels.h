// The table of kernels that every instruction set fills. bind.cpp has checked all shapes and types before
// a kernel sees them; T is 1 where the caller gave two-dimensional tokens, so tokens are always (N,T,features).
#pragma once
#include "view.h"

namespace ihvp {

// `out_of_memory` is the only way in which a kernel can fail.
enum class Status : int32_t { ok, out_of_memory };

// What a float32 product may be made of where the processor gains by it: itself, three bfloat16 products, or one;
// int8x3: three products of eight-bit integers, or bf16x3 where these are not accurate enough; int16: one of 16-bit
// integers, or float32 where a number is out of their range.
enum class Precision : int32_t { float32, bf16x3, bf16, int8x3, int16 };

// Which contraction runs first; the cost model of the op decides.
enum class Order : int32_t { project_first, gradient_first, query_first };

struct Kernels {
    const char* isa;
    Status (*covariance_update)(View C, View x, View mask, bool bias, Precision precision, int threads);
    Status (*eigenbasis_project)(View out, View x, View U, View mask, bool bias, int threads);
    Status (*eigenbasis_rotate)(View out, View V, View U_A, View U_G, bool inverse, int threads);
    Status (*ekfac_diagonal_update)(View Lambda, View a, View delta, View U_A, View U_G, View mask, bool bias,
                                    Order order, Precision precision, int threads);
    Status (*ekfac_self_influence)(View out, View a, View delta, View U_A, View U_G, View Lambda, double damping,
                                   View mask, bool bias, int threads);
    Status (*ekfac_solve)(View out, View V, View U_A, View U_G, View Lambda, const double* damping, int threads);
    Status (*weighted_ghost_dot)(View out, View a1, View delta1, View a2, View delta2, View weight, View mask1,
                                 View mask2, bool bias, Precision precision, int threads);
    Status (*gradient_dot)(View out, View P, View a, View delta, View mask, bool bias, bool per_token, Order order,
                           Precision precision, int threads);
    Status (*gradient_dot_grouped)(View out, const View* P, const View* a, const View* delta, int64_t layers, View mask,
                                   bool bias, int threads);
    Status (*kfac_solve)(View out, View V, View L_A, View L_G, int threads);
    Status (*ghost_dot)(View out, View a1, View delta1, View a2, View delta2, View mask1, View mask2, bool bias1,
                        bool bias2, bool per_token, int threads);
    Status (*ghost_norm)(View out, View a, View delta, View mask, bool bias, int threads);
    Status (*per_sample_gradient)(View out, View a, View delta, View mask, bool bias, int threads);
    // Multiply-adds in registers alone; both return the floating point operations they did. peak_bf16: null without.
    int64_t (*peak)(double* sums, bool wide, double scale, double shift, int64_t rounds, int threads);
    int64_t (*peak_bf16)(int64_t rounds, int threads);
};

}  // namespace ihvp
