// Large output tensors on memory that is kept between calls.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace fastvlp {

// Contiguous, uninitialised, of the shape and dtype of `t`.
torch::stable::Tensor empty_output(const torch::stable::Tensor& t);

// The same of another shape.
torch::stable::Tensor empty_output(const torch::stable::Tensor& t,
                                   const std::vector<int64_t>& sizes);

// For the gradient of `t`: in its strides where they leave no gaps and no two elements share a
// place, else contiguous. It is in this layout that autograd keeps gradients.
torch::stable::Tensor empty_gradient(const torch::stable::Tensor& t);

}  // namespace fastvlp
