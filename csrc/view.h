// All that a kernel may know about an array: where it lies, its element type, its shape and strides.
#pragma once
#include <cstdint>

namespace ihvp {

// i64 is what a table of pointers and strides is made of; no op takes it.
enum class DType : int32_t { f32, f64, bf16, f16, boolean, i64 };

constexpr int max_dims = 4;

// Strides count elements, may be zero or negative; `data` points at the element with all indices 0.
// A View without data stands for an argument that was not given.
struct View {
    void* data = nullptr;
    DType dtype = DType::f32;
    int32_t dims = 0;
    int64_t shape[max_dims] = {};
    int64_t stride[max_dims] = {};
};

}  // namespace ihvp
