// Large output tensors on memory that is kept between calls.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace fastvlp {

// Contiguous, uninitialised, of the shape and dtype of `t`.
torch::stable::Tensor empty_output(const torch::stable::Tensor& t);

}  // namespace fastvlp
