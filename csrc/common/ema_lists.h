// The lists of the multi-tensor operators, in the order of their tables. Host code.
#pragma once

#include "tensor_lists.h"

namespace fastvlp {

using Tensors = std::vector<Tensor>;

inline std::vector<TensorList> ema_lists(const Tensors& momentum, const Tensors& source,
                                         const Tensors& copies) {
  return {{"momentum", momentum, true, false},
          {"source", source, false, false},
          {"copies", copies, true, true}};
}

inline std::vector<TensorList> adamw_lists(const Tensors& weights, const Tensors& gradients,
                                           const Tensors& first, const Tensors& second,
                                           const Tensors& momentum, const Tensors& weight_copies,
                                           const Tensors& momentum_copies) {
  STD_TORCH_CHECK(momentum_copies.empty() || !momentum.empty(),
                  "momentum_copies: expected none without momentum");
  return {{"weights", weights, true, false},
          {"gradients", gradients, false, false},
          {"first_moments", first, true, false},
          {"second_moments", second, true, false},
          {"momentum", momentum, true, true},
          {"weight_copies", weight_copies, true, true},
          {"momentum_copies", momentum_copies, true, true}};
}

inline std::vector<TensorList> read_list(const Tensors& tensors) {
  return {{"tensors", tensors, false, false}};
}

}  // namespace fastvlp
