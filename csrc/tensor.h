// Reading a Python tensor through DLPack: by the C exchange API where its type offers one, by __dlpack__ otherwise.
// Only the parts of the DLPack ABI (version 1) that are read here are declared.
#pragma once
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>

#include "view.h"

namespace ihvp {

namespace py = pybind11;

namespace dlpack {

struct Tensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t* shape;
    int64_t* strides;  // null: contiguous
    uint64_t byte_offset;
};

struct ExchangeAPI {
    uint32_t major, minor;
    void* previous;
    void* allocate;
    void* managed_from_object;
    void* object_from_managed;
    int (*from_object)(void* object, Tensor* out);  // borrows from the object; may be null
    void* current_stream;
};

constexpr int32_t cpu = 1, cuda = 2;
constexpr uint8_t code_int = 0, code_float = 2, code_bfloat = 4, code_bool = 6;

}  // namespace dlpack

inline std::string text(const int64_t* shape, int count) {
    std::string s = "(";
    for (int i = 0; i < count; ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
    return s + (count == 1 ? ",)" : ")");
}

// One argument of an op, with the name its errors carry.
class Argument {
  public:
    View view;

    Argument(const char* name, py::handle object, bool optional = false, int32_t device = dlpack::cpu)
        : name_(name), device_(device) {
        if (object.is_none()) {
            if (!optional) fail("must be a tensor, got None");
            return;
        }
        dlpack::Tensor tensor{};
        if (!exchange(object, &tensor)) {
            if (!py::hasattr(object, "__dlpack__")) fail("must be a tensor");
            capsule_ = object.attr("__dlpack__")();
            auto* managed = static_cast<dlpack::Tensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
            if (managed == nullptr) throw py::error_already_set();
            tensor = *managed;
        }
        read(tensor);
    }

    // Tokens (N,T,features): two dimensions mean T = 1. A mask is tokens without features.
    const Argument& tokens() {
        if (view.dims == 2) insert_position();
        if (view.dims != 3) fail("must have 2 or 3 dimensions, got shape " + text(view.shape, view.dims));
        return *this;
    }
    const Argument& token_mask(int64_t N, int64_t T) {
        if (!view.data) return *this;
        if (view.dtype != DType::boolean) fail("must be bool");
        if (view.dims == 1) insert_position();
        return shape({N, T});
    }
    const Argument& shape(std::initializer_list<int64_t> expected) const {
        bool same = view.dims == int(expected.size());
        int i = 0;
        for (int64_t size : expected) same = same && view.shape[i++] == size;
        if (!same)
            fail("must have shape " + text(expected.begin(), int(expected.size())) + ", got " +
                 text(view.shape, view.dims));
        return *this;
    }
    const Argument& floating() const {
        if (view.data && view.dtype == DType::boolean) fail("must be floating point, got bool");
        return *this;
    }
    const Argument& contiguous() const {
        int64_t expected = 1;
        for (int i = view.dims - 1; i >= 0 && !empty(); --i) {
            if (view.shape[i] > 1 && view.stride[i] != expected) fail("must be contiguous");
            expected *= view.shape[i];
        }
        return *this;
    }
    // A result must give every index an address of its own, none of them shared with an operand.
    const Argument& writable(std::initializer_list<const Argument*> operands) const {
        if (!empty()) {
            int64_t reach = 1;
            bool taken[max_dims] = {};
            for (int step = 0; step < view.dims; ++step) {
                int next = -1;
                for (int i = 0; i < view.dims; ++i)
                    if (!taken[i] && (next < 0 || span(i) < span(next))) next = i;
                taken[next] = true;
                if (view.shape[next] > 1 && span(next) < reach) fail("overlaps itself in memory");
                if (view.shape[next] > 1) reach = span(next) * (view.shape[next] - 1) + reach;
            }
            for (const Argument* other : operands)
                if (!other->empty() && begin() < other->end() && other->begin() < end())
                    fail("overlaps " + other->name_ + " in memory");
        }
        return *this;
    }
    // A result of these operands: float64 where one of them is, in memory of its own.
    const Argument& result(std::initializer_list<const Argument*> operands) const {
        bool wide = false;
        for (const Argument* operand : operands) wide = wide || operand->wide();
        if (view.dtype != DType::f64 && (view.dtype != DType::f32 || wide))
            fail(wide ? "must be float64 for float64 operands" : "must be float32 or float64");
        return writable(operands);
    }
    bool empty() const {
        if (!view.data) return true;
        for (int i = 0; i < view.dims; ++i)
            if (view.shape[i] == 0) return true;
        return false;
    }
    bool wide() const { return view.data && view.dtype == DType::f64; }

    [[noreturn]] void fail(const std::string& what) const { throw py::value_error(name_ + " " + what); }

  private:
    std::string name_;
    int32_t device_;
    py::object capsule_;  // keeps a tensor exported by __dlpack__ alive

    static bool exchange(py::handle object, dlpack::Tensor* out) {
        static PyObject* known_type = nullptr;  // set once per type seen, under the interpreter lock
        static dlpack::ExchangeAPI* known_api = nullptr;
        PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
        if (type != known_type) {
            py::object attribute = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
            dlpack::ExchangeAPI* api = nullptr;
            if (PyCapsule_IsValid(attribute.ptr(), "dlpack_exchange_api"))
                api = static_cast<dlpack::ExchangeAPI*>(PyCapsule_GetPointer(attribute.ptr(), "dlpack_exchange_api"));
            if (api == nullptr || api->major != 1 || api->from_object == nullptr) return false;
            Py_XDECREF(known_type);
            Py_INCREF(type);
            known_type = type;
            known_api = api;
        }
        if (known_api->from_object(object.ptr(), out) != 0) throw py::error_already_set();
        return true;
    }

    void read(const dlpack::Tensor& t) {
        if (t.device_type != device_) fail(device_ == dlpack::cpu ? "must be on the CPU" : "must be on a CUDA device");
        if (t.ndim > max_dims) fail("has too many dimensions: " + text(t.shape, t.ndim));
        view.dims = t.ndim;
        int64_t contiguous = 1;
        for (int i = t.ndim - 1; i >= 0; --i) {
            view.shape[i] = t.shape[i];
            view.stride[i] = t.strides ? t.strides[i] : contiguous;
            contiguous *= t.shape[i];
        }
        if (t.type_lanes != 1) fail("has an unsupported element type");
        if (t.type_code == dlpack::code_float && t.type_bits == 32)
            view.dtype = DType::f32;
        else if (t.type_code == dlpack::code_float && t.type_bits == 64)
            view.dtype = DType::f64;
        else if (t.type_code == dlpack::code_float && t.type_bits == 16)
            view.dtype = DType::f16;
        else if (t.type_code == dlpack::code_bfloat && t.type_bits == 16)
            view.dtype = DType::bf16;
        else if (t.type_code == dlpack::code_bool && t.type_bits == 8)
            view.dtype = DType::boolean;
        else if (device_ == dlpack::cuda && t.type_code == dlpack::code_int && t.type_bits == 64)
            view.dtype = DType::i64;
        else
            fail("must be float32, float64, bfloat16, float16 or bool");
        static char nowhere;  // a View without data means "not given"; an empty tensor is given
        view.data = t.data ? static_cast<char*>(t.data) + t.byte_offset : &nowhere;
        if (t.data == nullptr && contiguous != 0) fail("has no memory");
    }

    void insert_position() {
        int last = view.dims++;
        if (last == 2) {
            view.shape[2] = view.shape[1];
            view.stride[2] = view.stride[1];
        }
        view.shape[1] = 1;
        view.stride[1] = 0;
    }

    int64_t span(int i) const { return view.stride[i] < 0 ? -view.stride[i] : view.stride[i]; }
    int64_t item() const {
        return view.dtype == DType::f64 || view.dtype == DType::i64 ? 8
               : view.dtype == DType::f32                           ? 4
               : view.dtype == DType::boolean                       ? 1
                                                                    : 2;
    }
    const char* begin() const {
        int64_t at = 0;
        for (int i = 0; i < view.dims; ++i)
            if (view.stride[i] < 0) at += view.stride[i] * (view.shape[i] - 1);
        return static_cast<const char*>(view.data) + at * item();
    }
    const char* end() const {
        int64_t at = 1;
        for (int i = 0; i < view.dims; ++i)
            if (view.stride[i] > 0) at += view.stride[i] * (view.shape[i] - 1);
        return static_cast<const char*>(view.data) + at * item();
    }
};

}  // namespace ihvp
