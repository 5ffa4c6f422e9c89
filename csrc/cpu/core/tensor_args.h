// Arguments of the CPU operators: tensors in the kernels' terms, checked.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>

#include "../../common/tensor_element.h"
#include "matrix_view.h"

namespace fastvlp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Features features_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected 2 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, ": expected unit stride along dim 1");
  return {t.const_data_ptr(), t.size(0), t.stride(0), element_of(t, name)};
}

// `n` contiguous values, in any shape.
template <class T>
const T* values_of(const Tensor& t, ScalarType type, int64_t n, const char* name,
                   const char* type_name) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == n, name,
                  ": expected ", n, " contiguous ", type_name, " values");
  return static_cast<const T*>(t.const_data_ptr());
}

inline const float* floats_of(const Tensor& t, int64_t n, const char* name) {
  return values_of<float>(t, ScalarType::Float, n, name, "float32");
}
inline const int64_t* int64s_of(const Tensor& t, int64_t n, const char* name) {
  return values_of<int64_t>(t, ScalarType::Long, n, name, "int64");
}
inline const bool* bools_of(const Tensor& t, int64_t n, const char* name) {
  return values_of<bool>(t, ScalarType::Bool, n, name, "bool");
}

inline int64_t integer_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Long, name,
                  ": expected one int64 value");
  return *static_cast<const int64_t*>(t.const_data_ptr());
}

inline float scalar_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Float, name,
                  ": expected one float32 value");
  return *static_cast<const float*>(t.const_data_ptr());
}

inline const float* floats_of(const Tensor& t) {
  return static_cast<const float*>(t.const_data_ptr());
}
inline float* mutable_floats_of(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

inline void run_parallel(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, 1, body);
}

}  // namespace fastvlp
