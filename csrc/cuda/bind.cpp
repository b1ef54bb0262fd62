// The optional module _cuda: checks every argument and launches on the caller's stream, a cudaStream_t as an integer.
// The caller has made the tensors' device current. Nothing is allocated and nothing waits.
#include <string>

#include "../tensor.h"
#include "launch.h"

namespace ihvp {
namespace {

using cuda::Operands;

void* handle(std::uintptr_t stream) { return reinterpret_cast<void*>(stream); }

void raise(const char* error) {
    if (error != nullptr) throw std::runtime_error(error);
}

Operands operands(const Argument& x) {
    switch (x.view.dtype) {
        case DType::f32: return Operands::f32;
        case DType::bf16: return Operands::bf16;
        case DType::f16: return Operands::f16;
        default: x.fail("must be float32, bfloat16 or float16");
    }
}

// Rows for asynchronous copies: contiguous, of whole 16 bytes, beginning at such an address.
void check_rows(const Argument& x) {
    x.contiguous();
    if (operands(x) == Operands::f16) x.fail("must be float32 or bfloat16");
    int64_t width = x.view.shape[x.view.dims - 1] * (x.view.dtype == DType::f32 ? 4 : 2);
    if (width % 16 != 0 || reinterpret_cast<std::uintptr_t>(x.view.data) % 16 != 0)
        x.fail("must have rows of whole 16 bytes, beginning at a multiple of 16 bytes");
}

void check_terms(int terms) {
    if (terms != 1 && terms != 3) throw py::value_error("terms must be 1 or 3, got " + std::to_string(terms));
}

void check_float(const Argument& x, DType type, const char* name) {
    if (x.view.dtype != type) x.fail(std::string("must be ") + name);
    x.contiguous();
}

// What a grid can count in y and z.
void check_count(const char* name, int64_t count) {
    if (count < 1 || count > 65535)
        throw py::value_error(std::string(name) + " must be from 1 to 65535, got " + std::to_string(count));
}

void ekfac_diagonal_update(py::handle out_, py::handle delta_, py::handle a_, bool squared, int terms,
                           std::uintptr_t stream) {
    Argument out("out", out_, false, dlpack::cuda), delta("delta", delta_, false, dlpack::cuda),
        a("a", a_, false, dlpack::cuda);
    check_terms(terms);
    check_float(out, DType::f32, "float32");
    if (out.view.dims != 3) out.fail("must be (parts,O,I')");
    if (a.view.dims != 3) a.fail("must be (N,T,width)");
    check_rows(a);
    check_rows(delta);
    delta.shape({a.view.shape[0], a.view.shape[1], delta.view.dims == 3 ? delta.view.shape[2] : -1});
    if (a.view.dtype != delta.view.dtype) delta.fail("must have the dtype of a");
    int64_t N = a.view.shape[0], T = a.view.shape[1], parts = out.view.shape[0];
    if (out.view.shape[1] > delta.view.shape[2]) out.fail("has more rows than delta has features");
    if (out.view.shape[2] > a.view.shape[2]) out.fail("has more columns than a has features");
    if (squared && (T != 1 || a.view.dtype != DType::f32)) a.fail("must be float32 with T = 1 to be squared");
    check_count("parts", parts);
    out.writable({&a, &delta});
    if (out.empty()) return;
    raise(cuda::launch_ekfac_diagonal_update(static_cast<float*>(out.view.data), delta.view.data, a.view.data,
                                             operands(a), N, T, out.view.shape[1], delta.view.shape[2],
                                             out.view.shape[2], a.view.shape[2], parts, terms, squared,
                                             handle(stream)));
}

void covariance_update(py::handle out_, py::handle x_, int64_t chunk, int terms, std::uintptr_t stream) {
    Argument out("out", out_, false, dlpack::cuda), x("x", x_, false, dlpack::cuda);
    check_terms(terms);
    check_float(out, DType::f64, "float64");
    if (out.view.dims != 3) out.fail("must be (parts,I',I')");
    int64_t d = out.view.shape[1];
    out.shape({out.view.shape[0], d, d});
    if (x.view.dims != 2) x.fail("must be (positions,width)");
    check_rows(x);
    if (d > x.view.shape[1]) out.fail("has more columns than x has features");
    if (chunk < 1) throw py::value_error("chunk must be at least 1, got " + std::to_string(chunk));
    check_count("parts", out.view.shape[0]);
    out.writable({&x});
    if (out.empty() || x.empty()) return;
    raise(cuda::launch_covariance_update(static_cast<double*>(out.view.data), x.view.data, operands(x),
                                         x.view.shape[0], d, x.view.shape[1], out.view.shape[0], chunk, terms,
                                         handle(stream)));
}

void check_table(const Argument& table, int64_t layers, int64_t entries) {
    if (table.view.dtype != DType::i64) table.fail("must be int64");
    table.shape({layers, entries}).contiguous();
}

// `like` is a token tensor of the group: the table's pointers are to its type.
void gradient_dot_grouped(py::handle out_, py::handle table_, py::handle mask_, py::handle like_, int64_t T, bool bias,
                          int terms, std::uintptr_t stream) {
    Argument out("out", out_, false, dlpack::cuda), table("table", table_, false, dlpack::cuda),
        mask("mask", mask_, true, dlpack::cuda), like("like", like_, false, dlpack::cuda);
    check_terms(terms);
    check_float(out, DType::f32, "float32");
    if (out.view.dims != 3) out.fail("must be (layers,Q,N)");
    check_table(table, out.view.shape[0], 14);
    if (mask.view.data) mask.token_mask(out.view.shape[2], T).contiguous();
    out.writable({&table, &mask});
    if (out.empty()) return;
    check_count("layers", out.view.shape[0]);
    check_count("Q", out.view.shape[1]);
    raise(cuda::launch_gradient_dot_grouped(
        static_cast<float*>(out.view.data), static_cast<const int64_t*>(table.view.data),
        static_cast<const unsigned char*>(mask.view.data), operands(like), out.view.shape[0], out.view.shape[1],
        out.view.shape[2], T, bias, terms, handle(stream)));
}

void ekfac_solve_grouped(py::handle table_, py::handle damping_, int64_t Q, std::uintptr_t stream) {
    Argument table("table", table_, false, dlpack::cuda), damping("damping", damping_, false, dlpack::cuda);
    check_float(damping, DType::f32, "float32");
    if (damping.view.dims != 1) damping.fail("must be (layers,)");
    check_table(table, damping.view.shape[0], 16);
    if (Q == 0) return;
    check_count("layers", damping.view.shape[0]);
    raise(cuda::launch_ekfac_solve_grouped(static_cast<const int64_t*>(table.view.data),
                                           static_cast<const float*>(damping.view.data), damping.view.shape[0], Q,
                                           handle(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of ihvp, for compute capability 8.0 and newer. Results are written into `out`.";
    using py::arg;
    m.def(
        "device_count",
        [] {
            const char* why_none = nullptr;
            return cuda::device_count(&why_none);
        },
        "CUDA devices that this process sees; 0 without a driver.");
    m.def(
        "why_no_device",
        [] {
            const char* why_none = nullptr;
            cuda::device_count(&why_none);
            return std::string(why_none ? why_none : "");
        },
        "What CUDA says when it sees no device; empty when it sees one.");
    m.def("architectures", [] { return std::string(IHVP_CUDA_ARCHITECTURES); }, "What the kernels were compiled for.");
    m.def("sources", [] { return std::string(IHVP_CUDA_SOURCES); }, "A digest of the sources of the kernels.");
    m.def("ekfac_diagonal_update", &ekfac_diagonal_update, arg("out"), arg("delta"), arg("a"), arg("squared"),
          arg("terms"), arg("stream"));
    m.def("covariance_update", &covariance_update, arg("out"), arg("x"), arg("chunk"), arg("terms"), arg("stream"));
    m.def("gradient_dot_grouped", &gradient_dot_grouped, arg("out"), arg("table"), arg("mask"), arg("like"), arg("T"),
          arg("bias"), arg("terms"), arg("stream"));
    m.def("ekfac_solve_grouped", &ekfac_solve_grouped, arg("table"), arg("damping"), arg("Q"), arg("stream"));
}

}  // namespace ihvp
