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

}  // namespace fastvlp
