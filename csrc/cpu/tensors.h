// What the operators' CPU files read off their tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "feature_rows.h"

namespace fastvlp {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[maybe_unused]] Element element_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

[[maybe_unused]] const float* floats_of(const Tensor& t) {
  return static_cast<const float*>(t.const_data_ptr());
}
[[maybe_unused]] float* mutable_floats_of(Tensor& t) {
  return static_cast<float*>(t.mutable_data_ptr());
}

}  // namespace
}  // namespace fastvlp
