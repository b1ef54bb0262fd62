// The extension module: picks the instruction set, checks every argument, calls the kernel without the
// interpreter lock. Results are tensors that the caller made; nothing is allocated or returned here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <new>
#ifdef IHVP_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"
#include "tensor.h"

#define IHVP_DECLARE(isa)         \
    namespace isa {               \
    extern const Kernels kernels; \
    }

namespace ihvp {

#ifdef IHVP_HAVE_AMX
namespace amx {
Status weighted_ghost_dot(View, View, View, View, View, View, View, View, bool, Precision, int);
int64_t peak_bf16(int64_t, int);
}  // namespace amx
#endif
#ifdef IHVP_HAVE_AVX512
IHVP_DECLARE(avx512)
#endif
#ifdef IHVP_HAVE_AVX2
IHVP_DECLARE(avx2)
#endif
#ifdef IHVP_HAVE_NEON
IHVP_DECLARE(neon)
#endif
#ifdef IHVP_HAVE_GENERIC
IHVP_DECLARE(generic)
#endif

namespace {

#ifdef IHVP_HAVE_AVX512
bool avx512_runs() {
    return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
           __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;
}
#endif

#ifdef IHVP_HAVE_AMX
// AVX-512's kernels, and what tiles add.
const Kernels* amx_kernels() {
    static const Kernels table = [] {
        Kernels own = avx512::kernels;
        own.isa = "amx";
        own.weighted_ghost_dot = amx::weighted_ghost_dot;
        own.peak_bf16 = amx::peak_bf16;
        return own;
    }();
    return &table;
}

// The processor has bfloat16 tiles and conversions, and the kernel lets this process use the tile registers.
bool amx_runs() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    bool tiles = (d & (1u << 22)) != 0 && (d & (1u << 24)) != 0;  // AMX-BF16, AMX-TILE
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
    bool conversions = (a & (1u << 5)) != 0;  // AVX512-BF16
    constexpr int request_permission = 0x1023, tile_data = 18;
    return tiles && conversions && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

struct Choice {
    const Kernels* kernels;
    bool runs_here;
};

// Best first.
std::vector<Choice> compiled() {
    std::vector<Choice> choices;
#ifdef IHVP_HAVE_AMX
    choices.push_back({amx_kernels(), avx512_runs() && amx_runs()});
#endif
#ifdef IHVP_HAVE_AVX512
    choices.push_back({&avx512::kernels, avx512_runs()});
#endif
#ifdef IHVP_HAVE_AVX2
    choices.push_back({&avx2::kernels, __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0});
#endif
#ifdef IHVP_HAVE_NEON
    choices.push_back({&neon::kernels, true});
#endif
#ifdef IHVP_HAVE_GENERIC
    choices.push_back({&generic::kernels, true});
#endif
    return choices;
}

const Kernels* select_isa(const char* wanted) {
    std::string names;
    for (const Choice& choice : compiled()) {
        if (!choice.runs_here) continue;
        if (wanted == nullptr || std::strcmp(wanted, choice.kernels->isa) == 0) return choice.kernels;
        names += std::string(names.empty() ? "" : ", ") + choice.kernels->isa;
    }
    throw py::value_error(std::string("instruction set must be one of ") + names + ", got " + wanted);
}

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
    throw py::value_error("precision must be float32, bf16x3 or bf16, got " + name);
}

// `work` counts multiply-adds, roughly. A thread joins only for a share worth waking it: about 10 us.
template <class F>
void call(int threads, int64_t work, const F& kernel) {
    if (threads < 1) throw py::value_error("threads must be at least 1, got " + std::to_string(threads));
    constexpr int64_t least_share = 1 << 19;
    int64_t useful = work / least_share + 1;
    threads = useful < threads ? int(useful) : threads;
    Status status;
    {
        py::gil_scoped_release release;
        status = kernel(threads);
    }
    if (status == Status::out_of_memory) throw std::bad_alloc();
}

void no_positions(const Argument& out) {
    if (!out.empty()) out.fail("must be empty when there are no positions, queries or examples");
}

void covariance_update(py::handle C_, py::handle x_, py::handle mask_, bool bias, int threads) {
    Argument C("C", C_), x("x", x_), mask("mask", mask_, true);
    x.tokens().floating();
    mask.token_mask(x.view.shape[0], x.view.shape[1]);
    int64_t d = x.view.shape[2] + bias;
    C.shape({d, d}).accumulator(x.view.dtype).writable({&x, &mask});
    if (x.view.shape[0] * x.view.shape[1] == 0 || d == 0) return;
    call(threads, x.view.shape[0] * x.view.shape[1] * d * d,
         [&](int threads) { return kernels->covariance_update(C.view, x.view, mask.view, bias, threads); });
}

void eigenbasis_project(py::handle out_, py::handle x_, py::handle U_, py::handle mask_, bool bias, int threads) {
    Argument out("out", out_), x("x", x_), U("U", U_), mask("mask", mask_, true);
    x.tokens().floating();
    mask.token_mask(x.view.shape[0], x.view.shape[1]);
    int64_t d = x.view.shape[2] + bias;
    U.shape({d, d}).floating();
    out.tokens()
        .shape({x.view.shape[0], x.view.shape[1], d})
        .accumulator(x.wide() || U.wide() ? DType::f64 : DType::f32)
        .writable({&x, &U, &mask});
    out.contiguous();
    if (out.empty()) return;
    call(threads, x.view.shape[0] * x.view.shape[1] * d * d,
         [&](int threads) { return kernels->eigenbasis_project(out.view, x.view, U.view, mask.view, bias, threads); });
}

void eigenbasis_rotate(py::handle out_, py::handle V_, py::handle U_A_, py::handle U_G_, bool inverse, int threads) {
    Argument out("out", out_), V("V", V_), U_A("U_A", U_A_), U_G("U_G", U_G_);
    V.tokens().floating();
    int64_t O = V.view.shape[1], I = V.view.shape[2];
    U_A.shape({I, I}).floating();
    U_G.shape({O, O}).floating();
    out.shape({V.view.shape[0], O, I})
        .accumulator(V.wide() || U_A.wide() || U_G.wide() ? DType::f64 : DType::f32)
        .writable({&V, &U_A, &U_G});
    if (out.empty()) return;
    call(threads, V.view.shape[0] * O * I * (O + I), [&](int threads) {
        return kernels->eigenbasis_rotate(out.view, V.view, U_A.view, U_G.view, inverse, threads);
    });
}

// a (N,T,I) and delta (N,T,O) of the same positions.
void check_tokens(Argument& a, Argument& delta, Argument& mask) {
    a.tokens().floating();
    delta.tokens().floating();
    delta.shape({a.view.shape[0], a.view.shape[1], delta.view.shape[2]});
    mask.token_mask(a.view.shape[0], a.view.shape[1]);
}

void check_basis(const Argument& U, int64_t d) {
    if (U.view.data) U.shape({d, d}).floating();
}

void ekfac_diagonal_update(py::handle Lambda_, py::handle a_, py::handle delta_, py::handle U_A_, py::handle U_G_,
                           py::handle mask_, bool bias, const std::string& order_, int threads) {
    Argument Lambda("Lambda", Lambda_), a("a", a_), delta("delta", delta_), U_A("U_A", U_A_, true),
        U_G("U_G", U_G_, true), mask("mask", mask_, true);
    Order order = order_named(order_, "project_first", Order::project_first);
    check_tokens(a, delta, mask);
    int64_t I = a.view.shape[2] + bias, O = delta.view.shape[2];
    check_basis(U_A, I);
    check_basis(U_G, O);
    bool wide = a.wide() || delta.wide() || U_A.wide() || U_G.wide();
    Lambda.shape({O, I}).accumulator(wide ? DType::f64 : DType::f32).writable({&a, &delta, &U_A, &U_G, &mask});
    if (Lambda.empty() || a.view.shape[0] * a.view.shape[1] == 0) return;
    if (order == Order::gradient_first && (!U_A.view.data || !U_G.view.data))
        throw py::value_error("gradient_first needs both U_A and U_G");
    call(threads, a.view.shape[0] * a.view.shape[1] * (I * I + O * O + O * I), [&](int threads) {
        return kernels->ekfac_diagonal_update(Lambda.view, a.view, delta.view, U_A.view, U_G.view, mask.view, bias,
                                              order, threads);
    });
}

void ekfac_self_influence(py::handle out_, py::handle a_, py::handle delta_, py::handle U_A_, py::handle U_G_,
                          py::handle Lambda_, double damping, py::handle mask_, bool bias, int threads) {
    Argument out("out", out_), a("a", a_), delta("delta", delta_), U_A("U_A", U_A_, true), U_G("U_G", U_G_, true),
        Lambda("Lambda", Lambda_), mask("mask", mask_, true);
    check_tokens(a, delta, mask);
    int64_t I = a.view.shape[2] + bias, O = delta.view.shape[2];
    check_basis(U_A, I);
    check_basis(U_G, O);
    Lambda.shape({O, I}).floating();
    bool wide = a.wide() || delta.wide() || U_A.wide() || U_G.wide() || Lambda.wide();
    out.shape({a.view.shape[0]})
        .accumulator(wide ? DType::f64 : DType::f32)
        .writable({&a, &delta, &U_A, &U_G, &Lambda, &mask});
    if (a.view.shape[1] * I * O == 0) return no_positions(out);
    if (out.empty()) return;
    call(threads, a.view.shape[0] * a.view.shape[1] * (I * I + O * O + O * I), [&](int threads) {
        return kernels->ekfac_self_influence(out.view, a.view, delta.view, U_A.view, U_G.view, Lambda.view, damping,
                                             mask.view, bias, threads);
    });
}

void ekfac_solve(py::handle out_, py::handle V_, py::handle U_A_, py::handle U_G_, py::handle Lambda_,
                 py::handle damping_, int threads) {
    Argument out("out", out_), V("V", V_), U_A("U_A", U_A_), U_G("U_G", U_G_), Lambda("Lambda", Lambda_),
        damping("damping", damping_);
    V.tokens().floating();
    int64_t O = V.view.shape[1], I = V.view.shape[2];
    U_A.shape({I, I}).floating();
    U_G.shape({O, O}).floating();
    Lambda.shape({O, I}).floating();
    if (damping.view.dims != 1 || damping.view.dtype != DType::f64) damping.fail("must be (D,) in float64");
    bool wide = V.wide() || U_A.wide() || U_G.wide() || Lambda.wide();
    out.shape({damping.view.shape[0], V.view.shape[0], O, I})
        .accumulator(wide ? DType::f64 : DType::f32)
        .writable({&V, &U_A, &U_G, &Lambda, &damping});
    if (out.empty()) return;
    call(threads, V.view.shape[0] * O * I * (O + I), [&](int threads) {
        return kernels->ekfac_solve(out.view, V.view, U_A.view, U_G.view, Lambda.view, damping.view, threads);
    });
}

void weighted_ghost_dot(py::handle out_, py::handle a1_, py::handle delta1_, py::handle a2_, py::handle delta2_,
                        py::handle weight_, py::handle mask1_, py::handle mask2_, bool bias,
                        const std::string& precision_, int threads) {
    Argument out("out", out_), a1("a1", a1_), delta1("delta1", delta1_), a2("a2", a2_), delta2("delta2", delta2_),
        weight("weight", weight_), mask1("mask1", mask1_, true), mask2("mask2", mask2_, true);
    Precision precision = precision_named(precision_);
    check_tokens(a1, delta1, mask1);
    check_tokens(a2, delta2, mask2);
    a1.shape({a1.view.shape[0], 1, a1.view.shape[2]});
    a2.shape({a2.view.shape[0], 1, a1.view.shape[2]});
    delta2.shape({delta2.view.shape[0], 1, delta1.view.shape[2]});
    weight.shape({delta1.view.shape[2], a1.view.shape[2] + bias}).floating();
    bool wide = a1.wide() || delta1.wide() || a2.wide() || delta2.wide() || weight.wide();
    out.shape({a1.view.shape[0], a2.view.shape[0]})
        .accumulator(wide ? DType::f64 : DType::f32)
        .writable({&a1, &delta1, &a2, &delta2, &weight, &mask1, &mask2});
    if (weight.empty()) return no_positions(out);
    if (out.empty()) return;
    call(threads, a1.view.shape[0] * a2.view.shape[0] * weight.view.shape[0] * weight.view.shape[1], [&](int threads) {
        return kernels->weighted_ghost_dot(out.view, a1.view, delta1.view, a2.view, delta2.view, weight.view,
                                           mask1.view, mask2.view, bias, precision, threads);
    });
}

void gradient_dot(py::handle out_, py::handle P_, py::handle a_, py::handle delta_, py::handle mask_, bool bias,
                  bool per_token, const std::string& order_, int threads) {
    Argument out("out", out_), P("P", P_), a("a", a_), delta("delta", delta_), mask("mask", mask_, true);
    Order order = order_named(order_, "query_first", Order::query_first);
    check_tokens(a, delta, mask);
    int64_t N = a.view.shape[0], T = a.view.shape[1], I = a.view.shape[2] + bias, O = delta.view.shape[2];
    P.floating().shape({P.view.shape[0], O, I});
    DType type = P.wide() || a.wide() || delta.wide() ? DType::f64 : DType::f32;
    if (per_token)
        out.shape({P.view.shape[0], N, T});
    else
        out.shape({P.view.shape[0], N});
    out.accumulator(type).writable({&P, &a, &delta, &mask});
    if (order == Order::gradient_first && per_token)
        throw py::value_error("gradient_first sums over positions; per_token needs query_first");
    if (T * O * I == 0) return no_positions(out);
    if (out.empty()) return;
    call(threads, (T + P.view.shape[0]) * N * O * I, [&](int threads) {
        return kernels->gradient_dot(out.view, P.view, a.view, delta.view, mask.view, bias, per_token, order, threads);
    });
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
        out.accumulator(query.wide() || x.wide() || d.wide() ? DType::f64 : DType::f32).writable({&query, &x, &d});
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
    call(threads, work, [&](int threads) {
        return kernels->gradient_dot_grouped(out.view, P.data(), a.data(), delta.data(), int64_t(P.size()), mask.view,
                                             bias, threads);
    });
}

void kfac_solve(py::handle out_, py::handle V_, py::handle L_A_, py::handle L_G_, int threads) {
    Argument out("out", out_), V("V", V_), L_A("L_A", L_A_), L_G("L_G", L_G_);
    V.tokens().floating();
    int64_t O = V.view.shape[1], I = V.view.shape[2];
    L_A.shape({I, I}).floating();
    L_G.shape({O, O}).floating();
    out.shape({V.view.shape[0], O, I})
        .accumulator(V.wide() || L_A.wide() || L_G.wide() ? DType::f64 : DType::f32)
        .writable({&V, &L_A, &L_G});
    if (out.empty()) return;
    call(threads, V.view.shape[0] * O * I * (O + I),
         [&](int threads) { return kernels->kfac_solve(out.view, V.view, L_A.view, L_G.view, threads); });
}

void ghost_dot(py::handle out_, py::handle a1_, py::handle delta1_, py::handle a2_, py::handle delta2_,
               py::handle mask1_, py::handle mask2_, bool bias1, bool bias2, bool per_token, int threads) {
    Argument out("out", out_), a1("a1", a1_), delta1("delta1", delta1_), a2("a2", a2_), delta2("delta2", delta2_),
        mask1("mask1", mask1_, true), mask2("mask2", mask2_, true);
    check_tokens(a1, delta1, mask1);
    check_tokens(a2, delta2, mask2);
    int64_t M = a1.view.shape[0], T1 = a1.view.shape[1], N = a2.view.shape[0], T2 = a2.view.shape[1];
    int64_t I = a1.view.shape[2] + bias1, O = delta1.view.shape[2];
    a2.shape({N, T2, I - bias2});
    delta2.shape({N, T2, O});
    if (per_token)
        out.shape({M, N, T2});
    else
        out.shape({M, N});
    bool wide = a1.wide() || delta1.wide() || a2.wide() || delta2.wide();
    out.accumulator(wide ? DType::f64 : DType::f32).writable({&a1, &delta1, &a2, &delta2, &mask1, &mask2});
    out.contiguous();
    if (T1 * T2 == 0) return no_positions(out);
    if (out.empty()) return;
    call(threads, M * T1 * N * T2 * (I + O), [&](int threads) {
        return kernels->ghost_dot(out.view, a1.view, delta1.view, a2.view, delta2.view, mask1.view, mask2.view, bias1,
                                  bias2, per_token, threads);
    });
}

void ghost_norm(py::handle out_, py::handle a_, py::handle delta_, py::handle mask_, bool bias, int threads) {
    Argument out("out", out_), a("a", a_), delta("delta", delta_), mask("mask", mask_, true);
    check_tokens(a, delta, mask);
    int64_t N = a.view.shape[0], T = a.view.shape[1];
    out.shape({N}).accumulator(a.wide() || delta.wide() ? DType::f64 : DType::f32).writable({&a, &delta, &mask});
    if (T == 0) return no_positions(out);
    if (out.empty()) return;
    call(threads, N * T * T * (a.view.shape[2] + bias + delta.view.shape[2]),
         [&](int threads) { return kernels->ghost_norm(out.view, a.view, delta.view, mask.view, bias, threads); });
}

void per_sample_gradient(py::handle out_, py::handle a_, py::handle delta_, py::handle mask_, bool bias, int threads) {
    Argument out("out", out_), a("a", a_), delta("delta", delta_), mask("mask", mask_, true);
    check_tokens(a, delta, mask);
    int64_t N = a.view.shape[0], T = a.view.shape[1], I = a.view.shape[2] + bias, O = delta.view.shape[2];
    out.shape({N, O, I}).accumulator(a.wide() || delta.wide() ? DType::f64 : DType::f32).writable({&a, &delta, &mask});
    if (T == 0) return no_positions(out);
    if (out.empty()) return;
    call(threads, N * T * O * I, [&](int threads) {
        return kernels->per_sample_gradient(out.view, a.view, delta.view, mask.view, bias, threads);
    });
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

    using py::arg;
    m.def("covariance_update", &covariance_update, arg("C"), arg("x"), arg("mask"), arg("bias"), arg("threads"));
    m.def("eigenbasis_project", &eigenbasis_project, arg("out"), arg("x"), arg("U"), arg("mask"), arg("bias"),
          arg("threads"));
    m.def("eigenbasis_rotate", &eigenbasis_rotate, arg("out"), arg("V"), arg("U_A"), arg("U_G"), arg("inverse"),
          arg("threads"));
    m.def("ekfac_diagonal_update", &ekfac_diagonal_update, arg("Lambda"), arg("a"), arg("delta"), arg("U_A"),
          arg("U_G"), arg("mask"), arg("bias"), arg("order"), arg("threads"));
    m.def("ekfac_self_influence", &ekfac_self_influence, arg("out"), arg("a"), arg("delta"), arg("U_A"), arg("U_G"),
          arg("Lambda"), arg("damping"), arg("mask"), arg("bias"), arg("threads"));
    m.def("ekfac_solve", &ekfac_solve, arg("out"), arg("V"), arg("U_A"), arg("U_G"), arg("Lambda"), arg("damping"),
          arg("threads"));
    m.def("weighted_ghost_dot", &weighted_ghost_dot, arg("out"), arg("a1"), arg("delta1"), arg("a2"), arg("delta2"),
          arg("weight"), arg("mask1"), arg("mask2"), arg("bias"), arg("precision"), arg("threads"));
    m.def("gradient_dot", &gradient_dot, arg("out"), arg("P"), arg("a"), arg("delta"), arg("mask"), arg("bias"),
          arg("per_token"), arg("order"), arg("threads"));
    m.def("gradient_dot_grouped", &gradient_dot_grouped, arg("out"), arg("P"), arg("a"), arg("delta"), arg("mask"),
          arg("bias"), arg("threads"));
    m.def("kfac_solve", &kfac_solve, arg("out"), arg("V"), arg("L_A"), arg("L_G"), arg("threads"));
    m.def("ghost_dot", &ghost_dot, arg("out"), arg("a1"), arg("delta1"), arg("a2"), arg("delta2"), arg("mask1"),
          arg("mask2"), arg("bias1"), arg("bias2"), arg("per_token"), arg("threads"));
    m.def("ghost_norm", &ghost_norm, arg("out"), arg("a"), arg("delta"), arg("mask"), arg("bias"), arg("threads"));
    m.def("per_sample_gradient", &per_sample_gradient, arg("out"), arg("a"), arg("delta"), arg("mask"), arg("bias"),
          arg("threads"));
    m.def("peak", &peak, arg("dtype"), arg("rounds"), arg("threads"),
          "Run multiply-adds in registers alone, on float32, float64 or (AMX) bfloat16 numbers; returns how many "
          "floating "
          "point operations that were. Time it for the processor's peak.");
}

}  // namespace ihvp
