// The extension module: checks every argument, calls the kernel of the instruction set in use without the
// interpreter lock. Results are tensors that the caller made; nothing is allocated or returned here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <new>

#include "isa.h"
#include "tensor.h"

namespace ihvp {
namespace {

const Kernels* kernels = nullptr;

// "gradient_first", or the other order that the op has.
Order order_named(const std::string& name, const char* other, Order meaning) {
    if (name == other) return meaning;
    if (name == "gradient_first") return Order::gradient_first;
    throw py::value_error(std::string("order must be ") + other + " or gradient_first, got " + name);
}

Precision precision_named(const std::string& name) {
    if (name == "float32") return Precision::float32;
    if (name == "bf16x3") return Precision::bf16x3;
    if (name == "bf16") return Precision::bf16;
    if (name == "int8x3") return Precision::int8x3;
    if (name == "int16") return Precision::int16;
    throw py::value_error("precision must be float32, bf16x3, bf16, int8x3 or int16, got " + name);
}

// What a kernel takes for an argument.
View value(const Argument& argument) { return argument.view; }
template <class T>
T value(const T& other) {
    return other;
}

// `work` counts multiply-adds, roughly. A thread joins only for a share worth waking it: about 10 us.
template <class... Parameters, class... Given>
void call(int threads, int64_t work, Status (*kernel)(Parameters...), const Given&... given) {
    if (threads < 1) throw py::value_error("threads must be at least 1, got " + std::to_string(threads));
    constexpr int64_t least_share = 1 << 19;
    int64_t useful = work / least_share + 1;
    threads = useful < threads ? int(useful) : threads;
    Status status;
    {
        py::gil_scoped_release release;
        status = kernel(value(given)..., threads);
    }
    if (status == Status::out_of_memory) throw std::bad_alloc();
}

void no_positions(const Argument& out) {
    if (!out.empty()) out.fail("must be empty when there are no positions, queries or examples");
}

struct Sizes {
    int64_t N, T, I, O;  // I with the bias feature
};

// a (N,T,I) and delta (N,T,O) of the same positions.
Sizes check_tokens(Argument& a, Argument& delta, Argument& mask, bool bias) {
    a.tokens().floating();
    delta.tokens().floating();
    Sizes sizes{a.view.shape[0], a.view.shape[1], a.view.shape[2] + bias, delta.view.shape[2]};
    delta.shape({sizes.N, sizes.T, sizes.O});
    mask.token_mask(sizes.N, sizes.T);
    return sizes;
}

// V (Q,O,I') between a right (I',I') and a left (O,O) matrix.
Sizes check_between(Argument& V, const Argument& right, const Argument& left) {
    V.tokens().floating();
    Sizes sizes{V.view.shape[0], 1, V.view.shape[2], V.view.shape[1]};
    right.shape({sizes.I, sizes.I}).floating();
    left.shape({sizes.O, sizes.O}).floating();
    return sizes;
}

void covariance_update(py::handle C_, py::handle x_, py::handle mask_, bool bias, const std::string& precision_,
                       int threads) {
    Precision precision = precision_named(precision_);
    Argument C("C", C_), x("x", x_), mask("mask", mask_, true);
    x.tokens().floating();
    mask.token_mask(x.view.shape[0], x.view.shape[1]);
    int64_t d = x.view.shape[2] + bias;
    C.shape({d, d}).result({&x, &mask});
    if (x.view.shape[0] * x.view.shape[1] == 0 || d == 0) return;
    call(threads, x.view.shape[0] * x.view.shape[1] * d * d, kernels->covariance_update, C, x, mask, bias,
         precision);
}

void eigenbasis_project(py::handle out_, py::handle x_, py::handle U_, py::handle mask_, bool bias, int threads) {
    Argument out("out", out_), x("x", x_), U("U", U_), mask("mask", mask_, true);
    x.tokens().floating();
    mask.token_mask(x.view.shape[0], x.view.shape[1]);
    int64_t d = x.view.shape[2] + bias;
    U.shape({d, d}).floating();
    out.tokens().shape({x.view.shape[0], x.view.shape[1], d}).result({&x, &U, &mask});
    out.contiguous();
    if (out.empty()) return;
    call(threads, x.view.shape[0] * x.view.shape[1] * d * d, kernels->eigenbasis_project, out, x, U, mask, bias);
}

void eigenbasis_rotate(py::handle out_, py::handle V_, py::handle U_A_, py::handle U_G_, bool inverse, int threads) {
    Argument out("out", out_), V("V", V_), U_A("U_A", U_A_), U_G("U_G", U_G_);
    auto [Q, T, I, O] = check_between(V, U_A, U_G);
    out.shape({Q, O, I}).result({&V, &U_A, &U_G});
    if (out.empty()) return;
    call(threads, Q * O * I * (O + I), kernels->eigenbasis_rotate, out, V, U_A, U_G, inverse);
}

void check_basis(const Argument& U, int64_t d) {
    if (U.view.data) U.shape({d, d}).floating();
}

void ekfac_diagonal_update(py::handle Lambda_, py::handle a_, py::handle delta_, py::handle U_A_, py::handle U_G_,
                           py::handle mask_, bool bias, const std::string& order_, const std::string& precision_,
                           int threads) {
    Argument Lambda("Lambda", Lambda_), a("a", a_), delta("delta", delta_), U_A("U_A", U_A_, true),
        U_G("U_G", U_G_, true), mask("mask", mask_, true);
    Order order = order_named(order_, "project_first", Order::project_first);
    Precision precision = precision_named(precision_);
    auto [N, T, I, O] = check_tokens(a, delta, mask, bias);
    check_basis(U_A, I);
    check_basis(U_G, O);
    Lambda.shape({O, I}).result({&a, &delta, &U_A, &U_G, &mask});
    if (Lambda.empty() || N * T == 0) return;
    if (order == Order::gradient_first && (!U_A.view.data || !U_G.view.data))
        throw py::value_error("gradient_first needs both U_A and U_G");
    call(threads, N * T * (I * I + O * O + O * I), kernels->ekfac_diagonal_update, Lambda, a, delta, U_A, U_G, mask,
         bias, order, precision);
}

void ekfac_self_influence(py::handle out_, py::handle a_, py::handle delta_, py::handle U_A_, py::handle U_G_,
                          py::handle Lambda_, double damping, py::handle mask_, bool bias, int threads) {
    Argument out("out", out_), a("a", a_), delta("delta", delta_), U_A("U_A", U_A_, true), U_G("U_G", U_G_, true),
        Lambda("Lambda", Lambda_), mask("mask", mask_, true);
    auto [N, T, I, O] = check_tokens(a, delta, mask, bias);
    check_basis(U_A, I);
    check_basis(U_G, O);
    Lambda.shape({O, I}).floating();
    out.shape({N}).result({&a, &delta, &U_A, &U_G, &Lambda, &mask});
    if (T * I * O == 0) return no_positions(out);
    if (out.empty()) return;
    call(threads, N * T * (I * I + O * O + O * I), kernels->ekfac_self_influence, out, a, delta, U_A, U_G, Lambda,
         damping, mask, bias);
}

void ekfac_solve(py::handle out_, py::handle V_, py::handle U_A_, py::handle U_G_, py::handle Lambda_,
                 const std::vector<double>& damping, int threads) {
    Argument out("out", out_), V("V", V_), U_A("U_A", U_A_), U_G("U_G", U_G_), Lambda("Lambda", Lambda_);
    auto [Q, T, I, O] = check_between(V, U_A, U_G);
    Lambda.shape({O, I}).floating();
    out.shape({int64_t(damping.size()), Q, O, I}).result({&V, &U_A, &U_G, &Lambda});
    if (out.empty()) return;
    call(threads, Q * O * I * (O + I), kernels->ekfac_solve, out, V, U_A, U_G, Lambda, damping.data());
}

void weighted_ghost_dot(py::handle out_, py::handle a1_, py::handle delta1_, py::handle a2_, py::handle delta2_,
                        py::handle weight_, py::handle mask1_, py::handle mask2_, bool bias,
                        const std::string& precision_, int threads) {
    Argument out("out", out_), a1("a1", a1_), delta1("delta1", delta1_), a2("a2", a2_), delta2("delta2", delta2_),
        weight("weight", weight_), mask1("mask1", mask1_, true), mask2("mask2", mask2_, true);
    Precision precision = precision_named(precision_);
    auto [M, T1, I, O] = check_tokens(a1, delta1, mask1, bias);
    auto [N, T2, I2, O2] = check_tokens(a2, delta2, mask2, bias);
    a1.shape({M, 1, I - bias});
    a2.shape({N, 1, I - bias});
    delta2.shape({N, 1, O});
    weight.shape({O, I}).floating();
    out.shape({M, N}).result({&a1, &delta1, &a2, &delta2, &weight, &mask1, &mask2});
    if (weight.empty()) return no_positions(out);
    if (out.empty()) return;
    call(threads, M * N * O * I, kernels->weighted_ghost_dot, out, a1, delta1, a2, delta2, weight, mask1, mask2, bias,
         precision);
}

void gradient_dot(py::handle out_, py::handle P_, py::handle a_, py::handle delta_, py::handle mask_, bool bias,
                  bool per_token, const std::string& order_, const std::string& precision_, int threads) {
    Argument out("out", out_), P("P", P_), a("a", a_), delta("delta", delta_), mask("mask", mask_, true);
    Order order = order_named(order_, "query_first", Order::query_first);
    Precision precision = precision_named(precision_);
    auto [N, T, I, O] = check_tokens(a, delta, mask, bias);
    P.floating().shape({P.view.shape[0], O, I});
    if (per_token)
        out.shape({P.view.shape[0], N, T});
    else
        out.shape({P.view.shape[0], N});
    out.result({&P, &a, &delta, &mask});
    if (order == Order::gradient_first && per_token)
        throw py::value_error("gradient_first sums over positions; per_token needs query_first");
    if (T * O * I == 0) return no_positions(out);
    if (out.empty()) return;
    call(threads, (T + P.view.shape[0]) * N * O * I, kernels->gradient_dot, out, P, a, delta, mask, bias, per_token,
         order, precision);
}

// Lists of one tensor a layer.
void gradient_dot_grouped(py::handle out_, py::list P_, py::list a_, py::list delta_, py::handle mask_, bool bias,
                          int threads) {
    size_t layers = P_.size();
    if (layers == 0 || a_.size() != layers || delta_.size() != layers)
        throw py::value_error("P, a and delta must be lists of one tensor a layer, got " + std::to_string(layers) +
                              ", " + std::to_string(a_.size()) + ", " + std::to_string(delta_.size()));
    Argument out("out", out_), mask("mask", mask_, true);
    if (out.view.dims != 2) out.fail("must be (Q,N)");
    std::vector<View> P, a, delta;
    int64_t Q = out.view.shape[0], N = out.view.shape[1], T = -1, work = 0;
    for (size_t layer = 0; layer < layers; ++layer) {
        Argument query("P", P_[layer]), x("a", a_[layer]), d("delta", delta_[layer]);
        x.tokens().floating();
        d.tokens().floating();
        if (layer == 0) T = x.view.shape[1];
        int64_t O = d.view.shape[2], I = x.view.shape[2] + bias;
        x.shape({N, T, I - bias});
        d.shape({N, T, O});
        query.floating().shape({Q, O, I});
        out.result({&query, &x, &d});
        if (T * O * I == 0) continue;
        work += (T + Q) * N * O * I;
        P.push_back(query.view);
        a.push_back(x.view);
        delta.push_back(d.view);
    }
    mask.token_mask(N, T);
    out.writable({&mask});
    if (P.empty()) return no_positions(out);
    if (out.empty()) return;
    call(threads, work, kernels->gradient_dot_grouped, out, P.data(), a.data(), delta.data(), int64_t(P.size()), mask,
         bias);
}

void kfac_solve(py::handle out_, py::handle V_, py::handle L_A_, py::handle L_G_, int threads) {
    Argument out("out", out_), V("V", V_), L_A("L_A", L_A_), L_G("L_G", L_G_);
    auto [Q, T, I, O] = check_between(V, L_A, L_G);
    out.shape({Q, O, I}).result({&V, &L_A, &L_G});
    if (out.empty()) return;
    call(threads, Q * O * I * (O + I), kernels->kfac_solve, out, V, L_A, L_G);
}

void ghost_dot(py::handle out_, py::handle a1_, py::handle delta1_, py::handle a2_, py::handle delta2_,
               py::handle mask1_, py::handle mask2_, bool bias1, bool bias2, bool per_token, int threads) {
    Argument out("out", out_), a1("a1", a1_), delta1("delta1", delta1_), a2("a2", a2_), delta2("delta2", delta2_),
        mask1("mask1", mask1_, true), mask2("mask2", mask2_, true);
    auto [M, T1, I, O] = check_tokens(a1, delta1, mask1, bias1);
    auto [N, T2, I2, O2] = check_tokens(a2, delta2, mask2, bias2);
    a2.shape({N, T2, I - bias2});
    delta2.shape({N, T2, O});
    if (per_token)
        out.shape({M, N, T2});
    else
        out.shape({M, N});
    out.result({&a1, &delta1, &a2, &delta2, &mask1, &mask2});
    out.contiguous();
    if (T1 * T2 == 0) return no_positions(out);
    if (out.empty()) return;
    call(threads, M * T1 * N * T2 * (I + O), kernels->ghost_dot, out, a1, delta1, a2, delta2, mask1, mask2, bias1,
         bias2, per_token);
}

void ghost_norm(py::handle out_, py::handle a_, py::handle delta_, py::handle mask_, bool bias, int threads) {
    Argument out("out", out_), a("a", a_), delta("delta", delta_), mask("mask", mask_, true);
    auto [N, T, I, O] = check_tokens(a, delta, mask, bias);
    out.shape({N}).result({&a, &delta, &mask});
    if (T == 0) return no_positions(out);
    if (out.empty()) return;
    call(threads, N * T * T * (I + O), kernels->ghost_norm, out, a, delta, mask, bias);
}

void per_sample_gradient(py::handle out_, py::handle a_, py::handle delta_, py::handle mask_, bool bias, int threads) {
    Argument out("out", out_), a("a", a_), delta("delta", delta_), mask("mask", mask_, true);
    auto [N, T, I, O] = check_tokens(a, delta, mask, bias);
    out.shape({N, O, I}).result({&a, &delta, &mask});
    if (T == 0) return no_positions(out);
    if (out.empty()) return;
    call(threads, N * T * O * I, kernels->per_sample_gradient, out, a, delta, mask, bias);
}

int64_t peak(const std::string& dtype, int64_t rounds, int threads) {
    if (threads < 1) throw py::value_error("threads must be at least 1, got " + std::to_string(threads));
    if (rounds < 1) throw py::value_error("rounds must be at least 1, got " + std::to_string(rounds));
    bool wide = dtype == "float64", tiles = dtype == "bfloat16";
    if (!wide && !tiles && dtype != "float32")
        throw py::value_error("dtype must be float32, float64 or bfloat16, got " + dtype);
    if (tiles && kernels->peak_bf16 == nullptr)
        throw py::value_error(std::string("bfloat16 needs the instruction set amx, in use is ") + kernels->isa);
    std::vector<double> sums(static_cast<size_t>(threads));
    py::gil_scoped_release release;
    return tiles ? kernels->peak_bf16(rounds, threads) : kernels->peak(sums.data(), wide, 0.5, 1.0, rounds, threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels of ihvp. Arguments are tensors that speak DLPack; results are written into `out`.";
    kernels = select_isa(std::getenv("IHVP_ISA"));

    m.def(
        "isas",
        [] {
            py::dict result;
            for (const Choice& choice : compiled()) result[choice.kernels->isa] = choice.runs_here;
            return result;
        },
        "Instruction sets compiled in, best first, and whether this processor runs them.");
    m.def("isa", [] { return kernels->isa; }, "The instruction set in use.");
    m.def(
        "use_isa", [](const std::string& name) { kernels = select_isa(name.c_str()); }, py::arg("name"),
        "Switch to another instruction set of `isas()`.");
    m.def(
        "has_openmp",
        [] {
#ifdef _OPENMP
            return true;
#else
            return false;
#endif
        },
        "Whether the kernels were built with OpenMP.");

    auto define = [&m](const char* name, auto kernel, auto... names) { m.def(name, kernel, py::arg(names)...); };
    define("covariance_update", &covariance_update, "C", "x", "mask", "bias", "precision", "threads");
    define("eigenbasis_project", &eigenbasis_project, "out", "x", "U", "mask", "bias", "threads");
    define("eigenbasis_rotate", &eigenbasis_rotate, "out", "V", "U_A", "U_G", "inverse", "threads");
    define("ekfac_diagonal_update", &ekfac_diagonal_update, "Lambda", "a", "delta", "U_A", "U_G", "mask", "bias",
           "order", "precision", "threads");
    define("ekfac_self_influence", &ekfac_self_influence, "out", "a", "delta", "U_A", "U_G", "Lambda", "damping",
           "mask", "bias", "threads");
    define("ekfac_solve", &ekfac_solve, "out", "V", "U_A", "U_G", "Lambda", "damping", "threads");
    define("weighted_ghost_dot", &weighted_ghost_dot, "out", "a1", "delta1", "a2", "delta2", "weight", "mask1", "mask2",
           "bias", "precision", "threads");
    define("gradient_dot", &gradient_dot, "out", "P", "a", "delta", "mask", "bias", "per_token", "order",
           "precision", "threads");
    define("gradient_dot_grouped", &gradient_dot_grouped, "out", "P", "a", "delta", "mask", "bias", "threads");
    define("kfac_solve", &kfac_solve, "out", "V", "L_A", "L_G", "threads");
    define("ghost_dot", &ghost_dot, "out", "a1", "delta1", "a2", "delta2", "mask1", "mask2", "bias1", "bias2",
           "per_token", "threads");
    define("ghost_norm", &ghost_norm, "out", "a", "delta", "mask", "bias", "threads");
    define("per_sample_gradient", &per_sample_gradient, "out", "a", "delta", "mask", "bias", "threads");
    m.def("peak", &peak, py::arg("dtype"), py::arg("rounds"), py::arg("threads"),
          "Run multiply-adds in registers alone, on float32, float64 or (AMX) bfloat16 numbers; returns how many "
          "floating point operations that were. Time it for the processor's peak.");
}

}  // namespace ihvp
