// Arguments and results of the CPU operators: tensors in the kernels' terms, checked.
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

inline Tensor scalar_tensor(const Tensor& like, double value) {
  Tensor t = torch::stable::new_empty(like, {}, ScalarType::Float);
  *mutable_floats_of(t) = static_cast<float>(value);
  return t;
}

}  // namespace fastvlp
