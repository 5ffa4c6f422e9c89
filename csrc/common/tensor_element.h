// The element type of a tensor argument. Host code, torch's stable ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "element.h"

namespace fastvlp {

// `name`: the parts of the tensor's name in an error.
template <class... Name>
inline Element element_of(const torch::stable::Tensor& t, const Name&... name) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    default:
      STD_TORCH_CHECK(false, name..., ": expected float32, bfloat16 or float16");
  }
}

}  // namespace fastvlp
