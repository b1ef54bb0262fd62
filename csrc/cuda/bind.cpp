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

// (slices,rows,features) of 16-bit numbers, rows evenly apart, for a tensor map.
cuda::Rows rows(const Argument& x) {
    const View& v = x.view;
    if (v.dims != 3) x.fail("must be (N,T,features)");
    if (operands(x) == Operands::f32) x.fail("must be bfloat16 or float16");
    bool near = v.shape[2] == 1 || v.stride[2] == 1;
    int64_t step = v.shape[1] > 1 ? v.stride[1] : v.shape[0] > 1 ? v.stride[0] : (v.shape[2] + 7) / 8 * 8;
    bool even = v.shape[0] <= 1 || v.shape[1] <= 1 || v.stride[0] == v.shape[1] * step;
    if (!near || !even || step < v.shape[2] || step % 8 != 0 || reinterpret_cast<std::uintptr_t>(v.data) % 16 != 0)
        x.fail("must have rows evenly apart, beginning at multiples of 16 bytes");
    return {v.data, v.shape[0], v.shape[1], v.shape[2], v.shape[1] * step, step};
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

// out (O,I') contiguous; parts (parts,O,I') float32 is scratch.
struct Target {
    Argument out, parts;
    bool wide;

    Target(py::handle out_, py::handle parts_)
        : out("out", out_, false, dlpack::cuda), parts("parts", parts_, false, dlpack::cuda) {
        wide = out.view.dtype == DType::f64;
        if (!wide && out.view.dtype != DType::f32) out.fail("must be float32 or float64");
        if (out.view.dims != 2) out.fail("must be (O,I')");
        out.contiguous();
        check_float(parts, DType::f32, "float32");
        parts.shape({parts.view.dims == 3 ? parts.view.shape[0] : -1, out.view.shape[0], out.view.shape[1]});
        check_count("parts", parts.view.shape[0]);
    }
    int64_t count() const { return parts.view.shape[0]; }
};

void ekfac_diagonal_update(py::handle out_, py::handle parts_, py::handle delta_, py::handle a_,
                           std::uintptr_t stream) {
    Target target(out_, parts_);
    Argument delta("delta", delta_, false, dlpack::cuda), a("a", a_, false, dlpack::cuda);
    cuda::Rows d = rows(delta), x = rows(a);
    int64_t O = target.out.view.shape[0], I = target.out.view.shape[1];
    delta.shape({x.slices, x.rows, delta.view.shape[2]});
    if (a.view.dtype != delta.view.dtype) delta.fail("must have the dtype of a");
    if (O > d.features) target.out.fail("has more rows than delta has features");
    if (I > x.features) target.out.fail("has more columns than a has features");
    target.out.writable({&a, &delta});
    target.parts.writable({&a, &delta, &target.out});
    if (target.out.empty() || a.empty()) return;
    raise(cuda::launch_sums(target.out.view.data, target.wide, static_cast<float*>(target.parts.view.data),
                            target.count(), d, x, operands(a), x.slices, x.rows, O, I, true, false, handle(stream)));
}

void covariance_update(py::handle out_, py::handle parts_, py::handle x_, int64_t chunk, std::uintptr_t stream) {
    Target target(out_, parts_);
    Argument x("x", x_, false, dlpack::cuda);
    cuda::Rows own = rows(x);
    int64_t d = target.out.view.shape[0];
    target.out.shape({d, d});
    if (d > own.features) target.out.fail("has more columns than x has features");
    if (chunk < 64 || chunk % 64 != 0) throw py::value_error("chunk must be a multiple of 64, got " + std::to_string(chunk));
    target.out.writable({&x});
    target.parts.writable({&x, &target.out});
    if (target.out.empty() || x.empty()) return;
    int64_t positions = own.slices * own.rows;
    own = {own.data, 1, positions, own.features, positions * own.stride_row, own.stride_row};
    raise(cuda::launch_sums(target.out.view.data, target.wide, static_cast<float*>(target.parts.view.data),
                            target.count(), own, own, operands(x), (positions + chunk - 1) / chunk, chunk, d, d, false,
                            true, handle(stream)));
}

void check_table(const Argument& table, int64_t layers, int64_t entries) {
    if (table.view.dtype != DType::i64) table.fail("must be int64");
    table.shape({layers, entries}).contiguous();
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
    m.doc() = "CUDA kernels of ihvp, for compute capability 8.0 and newer. Results are added to `out`, or written where a table says.";
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
    m.def("ekfac_diagonal_update", &ekfac_diagonal_update, arg("out"), arg("parts"), arg("delta"), arg("a"),
          arg("stream"));
    m.def("covariance_update", &covariance_update, arg("out"), arg("parts"), arg("x"), arg("chunk"), arg("stream"));
    m.def("ekfac_solve_grouped", &ekfac_solve_grouped, arg("table"), arg("damping"), arg("Q"), arg("stream"));
}

}  // namespace ihvp
