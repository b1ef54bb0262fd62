// Every kernel of one instruction set against loops in double: odd sizes, strides that run backwards, masks over
// numbers that are not finite, the bias feature, one position and several, both orders, one thread and two. A program
// of its own, so that sanitizers and emulators can run it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/kernels.h"

namespace ihvp {
namespace IHVP_ISA {
extern const Kernels kernels;
}
#ifdef IHVP_FIXED_POINT
namespace IHVP_FIXED_POINT {  // an instruction set of these kernels alone
Status covariance_update(View, View, View, bool, Precision, int);
Status ekfac_diagonal_update(View, View, View, View, View, View, bool, Order, Precision, int);
Status gradient_dot(View, View, View, View, View, bool, bool, Order, Precision, int);
Status weighted_ghost_dot(View, View, View, View, View, View, View, View, bool, Precision, int);
}
#endif
}  // namespace ihvp

using namespace ihvp;

namespace {

const Kernels& kernels = IHVP_ISA::kernels;
std::mt19937 random_bits(0);
int failures = 0, checks = 0;

// An array of doubles and the same numbers as a View of float or double, padded and reversed in memory as asked.
struct Array {
    std::vector<int64_t> shape;
    std::vector<double> values;
    std::vector<char> memory;
    View view;

    double& at(std::initializer_list<int64_t> index) { return values[size_t(offset(index))]; }
    int64_t offset(std::initializer_list<int64_t> index) const {
        int64_t o = 0;
        size_t d = 0;
        for (int64_t i : index) o = o * shape[d++] + i;
        return o;
    }
    // Writes `values` into memory of its own exact size: what a kernel reads beyond it, a sanitizer sees.
    void lay_out(bool wide, bool backwards) {
        int64_t size = wide ? 8 : 4, step = backwards ? -2 : 1, count = int64_t(values.size());
        for (double& x : values) x = wide ? x : double(float(x));
        memory.assign(size_t((std::abs(step) * std::max<int64_t>(count - 1, 0) + 1) * size), 0);
        view.dtype = wide ? DType::f64 : DType::f32;
        view.dims = int(shape.size());
        int64_t stride = step;
        for (int d = view.dims - 1; d >= 0; --d) {
            view.shape[d] = shape[size_t(d)];
            view.stride[d] = stride;
            stride *= shape[size_t(d)];
        }
        view.data = memory.data() + (backwards ? memory.size() - size_t(size) : 0);
        for (int64_t i = 0; i < count; ++i) {
            char* target = static_cast<char*>(view.data) + i * step * size;
            if (wide)
                *reinterpret_cast<double*>(target) = values[size_t(i)];
            else
                *reinterpret_cast<float*>(target) = float(values[size_t(i)]);
        }
    }
    double read(int64_t i) const {
        int64_t step = view.dims > 0 ? view.stride[view.dims - 1] : 1;
        return view.dtype == DType::f64 ? static_cast<const double*>(view.data)[i * step]
                                        : static_cast<const float*>(view.data)[i * step];
    }
};

Array numbers(std::vector<int64_t> shape, double low = -1, double high = 1) {
    Array a;
    a.shape = std::move(shape);
    int64_t count = 1;
    for (int64_t s : a.shape) count *= s;
    std::uniform_real_distribution<double> draw(low, high);
    for (int64_t i = 0; i < count; ++i) a.values.push_back(draw(random_bits));
    return a;
}

struct Case {
    int64_t N, T, I, O, Q;
    bool bias, masked, wide, backwards;
    int threads;
    std::string text() const {
        return "N=" + std::to_string(N) + " T=" + std::to_string(T) + " I=" + std::to_string(I) +
               " O=" + std::to_string(O) + " Q=" + std::to_string(Q) + (bias ? " bias" : "") +
               (masked ? " masked" : "") + (wide ? " float64" : " float32") + (backwards ? " backwards" : "") +
               " threads=" + std::to_string(threads);
    }
};

void compare(const Case& c, const std::string& kernel, const Array& got, const std::vector<double>& want,
             int64_t length, double unit = 1.2e-7) {
    double error = 0, scale = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        double difference = std::fabs(got.read(int64_t(i)) - want[i]);
        error = difference > error || std::isnan(difference) ? difference : error;
        scale = std::max(scale, std::fabs(want[i]));
    }
    double limit = 16 * (c.wide ? 2.2e-16 : unit) * std::sqrt(double(length)) * std::max(scale, 1e-30);
    ++checks;
    if (!(error <= limit)) {
        ++failures;
        std::printf("%s: off by %g, limit %g, at %s\n", kernel.c_str(), error, limit, c.text().c_str());
    }
}

void check(const Case& c) {
    int64_t J = c.I + c.bias, O = c.O;
    Array a = numbers({c.N, c.T, c.I}), delta = numbers({c.N, c.T, O});
    std::vector<char> flags(size_t(c.N * c.T), 1);
    View mask;
    if (c.masked) {
        for (size_t m = 0; m < flags.size(); ++m) flags[m] = m % 3 != 1;
        mask.data = flags.data();
        mask.dtype = DType::boolean;
        mask.dims = 2;
        mask.shape[0] = c.N;
        mask.shape[1] = c.T;
        mask.stride[0] = c.T;
        mask.stride[1] = 1;
        for (size_t m = 0; m < flags.size(); ++m) {
            for (int64_t i = 0; !flags[m] && i < c.I; ++i) a.values[m * size_t(c.I) + size_t(i)] = NAN;
        }
    }
    Array U_A = numbers({J, J}), U_G = numbers({O, O}), Lambda = numbers({O, J}, 0.5, 1.5), P = numbers({c.Q, O, J});
    Array L_A = numbers({J, J}, 0.1, 0.2), L_G = numbers({O, O}, 0.1, 0.2);
    for (Array* L : {&L_A, &L_G}) {
        int64_t d = L->shape[0];
        for (int64_t i = 0; i < d; ++i) {
            for (int64_t j = 0; j < d; ++j) L->at({i, j}) = i == j ? 2 : i > j ? L->at({i, j}) / double(d) : 0;
        }
    }
    for (Array* x : {&a, &delta, &U_A, &U_G, &Lambda, &P, &L_A, &L_G}) x->lay_out(c.wide, c.backwards);

    auto x = [&](int64_t n, int64_t t, int64_t i) {
        if (!flags[size_t(n * c.T + t)]) return 0.0;
        return i == c.I ? 1.0 : a.at({n, t, i});
    };
    auto d = [&](int64_t n, int64_t t, int64_t o) { return flags[size_t(n * c.T + t)] ? delta.at({n, t, o}) : 0.0; };
    std::vector<double> g(size_t(c.N * O * J));
    for (int64_t n = 0; n < c.N; ++n)
        for (int64_t o = 0; o < O; ++o)
            for (int64_t i = 0; i < J; ++i)
                for (int64_t t = 0; t < c.T; ++t) g[size_t((n * O + o) * J + i)] += d(n, t, o) * x(n, t, i);
    // left M right, both sides given as functions of (out, in)
    using Side = std::function<double(int64_t, int64_t)>;
    auto sandwich = [&](const double* M, const Side& left, const Side& right) {
        std::vector<double> half(size_t(O * J)), full(size_t(O * J));
        for (int64_t o = 0; o < O; ++o)
            for (int64_t i = 0; i < J; ++i)
                for (int64_t k = 0; k < J; ++k) half[size_t(o * J + i)] += M[o * J + k] * right(k, i);
        for (int64_t o = 0; o < O; ++o)
            for (int64_t k = 0; k < O; ++k)
                for (int64_t i = 0; i < J; ++i) full[size_t(o * J + i)] += left(o, k) * half[size_t(k * J + i)];
        return full;
    };
    Side G = [&](int64_t o, int64_t k) { return U_G.at({o, k}); },
         G_t = [&](int64_t o, int64_t k) { return U_G.at({k, o}); };
    Side A = [&](int64_t k, int64_t i) { return U_A.at({k, i}); },
         A_t = [&](int64_t k, int64_t i) { return U_A.at({i, k}); };

    auto result = [&](std::vector<int64_t> shape) {
        Array out = numbers(std::move(shape), 0, 0);
        out.lay_out(c.wide, false);
        return out;
    };
    int64_t M = c.N * c.T;

    Array C = result({J, J});
    kernels.covariance_update(C.view, a.view, mask, c.bias, Precision::float32, c.threads);
    std::vector<double> want(size_t(J * J));
    for (int64_t n = 0; n < c.N; ++n)
        for (int64_t t = 0; t < c.T; ++t)
            for (int64_t i = 0; i < J; ++i)
                for (int64_t k = 0; k < J; ++k) want[size_t(i * J + k)] += x(n, t, i) * x(n, t, k);
    compare(c, "covariance_update", C, want, M);
#ifdef IHVP_FIXED_POINT
    constexpr double fixed_unit = 3e-6;  // the error is about 1e-5 of the operands' norms
    Array fixed_C = result({J, J});
    IHVP_FIXED_POINT::covariance_update(fixed_C.view, a.view, mask, c.bias, Precision::int16, c.threads);
    compare(c, "covariance_update in fixed point", fixed_C, want, M, fixed_unit);
#endif

    Array projected = result({c.N, c.T, J});
    kernels.eigenbasis_project(projected.view, a.view, U_A.view, mask, c.bias, c.threads);
    want.assign(size_t(M * J), 0);
    for (int64_t n = 0; n < c.N; ++n)
        for (int64_t t = 0; t < c.T; ++t)
            for (int64_t i = 0; i < J; ++i)
                for (int64_t k = 0; k < J; ++k) want[size_t((n * c.T + t) * J + i)] += x(n, t, k) * U_A.at({k, i});
    compare(c, "eigenbasis_project", projected, want, J);

    std::vector<double> rotated, diagonal(size_t(O * J)), influence(size_t(c.N)), norms(size_t(c.N));
    for (int64_t n = 0; n < c.N; ++n) {
        rotated = sandwich(g.data() + n * O * J, G_t, A);
        for (size_t e = 0; e < rotated.size(); ++e) {
            diagonal[e] += rotated[e] * rotated[e];
            influence[size_t(n)] += rotated[e] * rotated[e] / (Lambda.values[e] + 0.25);
            norms[size_t(n)] += g[size_t(n * O * J) + e] * g[size_t(n * O * J) + e];
        }
    }
    for (Order order : {Order::project_first, Order::gradient_first}) {
        Array sums = result({O, J});
        kernels.ekfac_diagonal_update(sums.view, a.view, delta.view, U_A.view, U_G.view, mask, c.bias, order,
                                      Precision::float32, c.threads);
        compare(c, "ekfac_diagonal_update", sums, diagonal, M + O + J);
#ifdef IHVP_FIXED_POINT
        Array fixed = result({O, J});
        IHVP_FIXED_POINT::ekfac_diagonal_update(fixed.view, a.view, delta.view, U_A.view, U_G.view, mask, c.bias, order,
                                                Precision::int16, c.threads);
        compare(c, "ekfac_diagonal_update in fixed point", fixed, diagonal, M + O + J, fixed_unit);
#endif
    }
    Array influences = result({c.N});
    kernels.ekfac_self_influence(influences.view, a.view, delta.view, U_A.view, U_G.view, Lambda.view, 0.25, mask,
                                 c.bias, c.threads);
    compare(c, "ekfac_self_influence", influences, influence, c.T * (O + J));
    Array squares = result({c.N});
    kernels.ghost_norm(squares.view, a.view, delta.view, mask, c.bias, c.threads);
    compare(c, "ghost_norm", squares, norms, c.T * (O + J));
    Array gradients = result({c.N, O, J});
    kernels.per_sample_gradient(gradients.view, a.view, delta.view, mask, c.bias, c.threads);
    compare(c, "per_sample_gradient", gradients, g, c.T);

    for (bool inverse : {false, true}) {
        Array out = result({c.Q, O, J});
        kernels.eigenbasis_rotate(out.view, P.view, U_A.view, U_G.view, inverse, c.threads);
        want.clear();
        for (int64_t q = 0; q < c.Q; ++q) {
            auto one = inverse ? sandwich(&P.values[size_t(q * O * J)], G, A_t)
                               : sandwich(&P.values[size_t(q * O * J)], G_t, A);
            want.insert(want.end(), one.begin(), one.end());
        }
        compare(c, "eigenbasis_rotate", out, want, O + J);
    }
    const double damping[] = {0.1, 0.3};
    for (int64_t D : {1, 2}) {
        Array out = result({D, c.Q, O, J});
        kernels.ekfac_solve(out.view, P.view, U_A.view, U_G.view, Lambda.view, damping, c.threads);
        want.clear();
        for (int64_t e = 0; e < D; ++e) {
            for (int64_t q = 0; q < c.Q; ++q) {
                auto one = sandwich(&P.values[size_t(q * O * J)], G_t, A);
                for (size_t k = 0; k < one.size(); ++k) one[k] /= Lambda.values[k] + damping[e];
                one = sandwich(one.data(), G, A_t);
                want.insert(want.end(), one.begin(), one.end());
            }
        }
        compare(c, "ekfac_solve", out, want, 4 * (O + J));
    }

    want.assign(size_t(c.Q * c.N), 0);
    std::vector<double> tokens(size_t(c.Q * M));
    for (int64_t q = 0; q < c.Q; ++q)
        for (int64_t n = 0; n < c.N; ++n)
            for (int64_t t = 0; t < c.T; ++t)
                for (int64_t o = 0; o < O; ++o)
                    for (int64_t i = 0; i < J; ++i) {
                        double term = P.at({q, o, i}) * d(n, t, o) * x(n, t, i);
                        want[size_t(q * c.N + n)] += term;
                        tokens[size_t(q * M + n * c.T + t)] += term;
                    }
    for (Order order : {Order::query_first, Order::gradient_first}) {
        Array out = result({c.Q, c.N});
        kernels.gradient_dot(out.view, P.view, a.view, delta.view, mask, c.bias, false, order, Precision::float32,
                             c.threads);
        compare(c, "gradient_dot", out, want, c.T * O * J);
#ifdef IHVP_FIXED_POINT
        Array fixed = result({c.Q, c.N});
        IHVP_FIXED_POINT::gradient_dot(fixed.view, P.view, a.view, delta.view, mask, c.bias, false, order,
                                       Precision::int16, c.threads);
        compare(c, "gradient_dot in fixed point", fixed, want, c.T * O * J, fixed_unit);
#endif
    }
    {
        // The same layer twice, and its first output alone.
        View narrow = delta.view, query = P.view;
        narrow.shape[2] = query.shape[1] = 1;
        View queries[] = {P.view, query, P.view}, inputs[] = {a.view, a.view, a.view};
        View deltas[] = {delta.view, narrow, delta.view};
        std::vector<double> sums = want;
        for (int64_t q = 0; q < c.Q; ++q)
            for (int64_t n = 0; n < c.N; ++n) {
                double first = 0;
                for (int64_t t = 0; t < c.T; ++t)
                    for (int64_t i = 0; i < J; ++i) first += P.at({q, 0, i}) * d(n, t, 0) * x(n, t, i);
                sums[size_t(q * c.N + n)] = 2 * want[size_t(q * c.N + n)] + first;
            }
        Array out = result({c.Q, c.N});
        kernels.gradient_dot_grouped(out.view, queries, inputs, deltas, 3, mask, c.bias, c.threads);
        compare(c, "gradient_dot_grouped", out, sums, 3 * c.T * O * J);
    }
    Array each = result({c.Q, c.N, c.T});
    kernels.gradient_dot(each.view, P.view, a.view, delta.view, mask, c.bias, true, Order::query_first,
                         Precision::float32, c.threads);
    compare(c, "gradient_dot per token", each, tokens, O * J);

    want.assign(size_t(c.N * c.N), 0);
    for (int64_t m = 0; m < c.N; ++m)
        for (int64_t n = 0; n < c.N; ++n)
            for (int64_t e = 0; e < O * J; ++e)
                want[size_t(m * c.N + n)] += g[size_t(m * O * J + e)] * g[size_t(n * O * J + e)];
    Array ghosts = result({c.N, c.N});
    kernels.ghost_dot(ghosts.view, a.view, delta.view, a.view, delta.view, mask, mask, c.bias, c.bias, false,
                      c.threads);
    compare(c, "ghost_dot", ghosts, want, c.T * (O + J));
    if (c.T == 1) {
        want.assign(size_t(c.N * c.N), 0);
        for (int64_t m = 0; m < c.N; ++m)
            for (int64_t n = 0; n < c.N; ++n)
                for (int64_t e = 0; e < O * J; ++e)
                    want[size_t(m * c.N + n)] +=
                        g[size_t(m * O * J + e)] * g[size_t(n * O * J + e)] * Lambda.values[size_t(e)];
        Array weighted = result({c.N, c.N});
        kernels.weighted_ghost_dot(weighted.view, a.view, delta.view, a.view, delta.view, Lambda.view, mask, mask,
                                   c.bias, Precision::float32, c.threads);
        compare(c, "weighted_ghost_dot", weighted, want, O + J);
#ifdef IHVP_FIXED_POINT
        Array fixed = result({c.N, c.N});
        IHVP_FIXED_POINT::weighted_ghost_dot(fixed.view, a.view, delta.view, a.view, delta.view, Lambda.view, mask,
                                             mask, c.bias, Precision::int16, c.threads);
        compare(c, "weighted_ghost_dot in fixed point", fixed, want, O + J, fixed_unit);
#endif
    }

    // kfac_solve: (G (x) A) applied to the answer gives V back.
    Array out = result({c.Q, O, J});
    kernels.kfac_solve(out.view, P.view, L_A.view, L_G.view, c.threads);
    auto gram = [](Array& L) {
        int64_t n = L.shape[0];
        std::vector<double> product(size_t(n * n));
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < n; ++j)
                for (int64_t k = 0; k < n; ++k) product[size_t(i * n + j)] += L.at({i, k}) * L.at({j, k});
        return product;
    };
    std::vector<double> AA = gram(L_A), GG = gram(L_G);
    Array back = numbers({c.Q, O, J}, 0, 0);
    for (int64_t q = 0; q < c.Q; ++q) {
        std::vector<double> solved;
        for (int64_t e = 0; e < O * J; ++e) solved.push_back(out.read(q * O * J + e));
        auto one = sandwich(
            solved.data(), [&](int64_t o, int64_t k) { return GG[size_t(o * O + k)]; },
            [&](int64_t k, int64_t i) { return AA[size_t(k * J + i)]; });
        std::copy(one.begin(), one.end(), back.values.begin() + q * O * J);
    }
    back.lay_out(true, false);
    compare(c, "kfac_solve", back, P.values, 4 * (O + J));
}

}  // namespace

int main() {
    const int64_t sizes[][5] = {{1, 1, 1, 1, 1},   {5, 1, 7, 3, 2},    {67, 1, 50, 25, 5},  {3, 5, 9, 49, 3},
                                {2, 20, 6, 97, 1}, {37, 3, 17, 10, 7}, {2, 130, 33, 16, 4}, {4, 2, 193, 24, 2}};
    for (const auto& s : sizes)
        for (bool bias : {false, true})
            for (bool masked : {false, true})
                for (bool wide : {false, true})
                    for (bool backwards : {false, true})
                        check({s[0], s[1], s[2], s[3], s[4], bias, masked, wide, backwards, masked ? 2 : 1});
    std::printf("%s: %d checks, %d failures\n", kernels.isa, checks, failures);
    return failures > 0;
}
