// Output tensors: small ones at little cost a call, large ones on memory kept between calls.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "../../common/stable_abi.h"

namespace fastvlp {

// Contiguous, uninitialised, on torch's own memory. Straight from its allocator: torch::stable's
// new_empty looks its operator up by name at every call, which takes longer. `dtype` is one of
// aoti_torch_dtype_float32() and its like.
torch::stable::Tensor empty_tensor(const std::vector<int64_t>& sizes, int32_t dtype);

int32_t dtype_of(const torch::stable::Tensor& t);

// float32, of no dimensions.
torch::stable::Tensor scalar_tensor(double value);

// Those below lie on kept memory where they are large.

// Contiguous, uninitialised, of the shape and dtype of `t`.
torch::stable::Tensor empty_output(const torch::stable::Tensor& t);

// The same of another shape.
torch::stable::Tensor empty_output(const torch::stable::Tensor& t,
                                   const std::vector<int64_t>& sizes);

// For the gradient of `t`: in its strides where they leave no gaps and no two elements share a
// place, else contiguous. It is in this layout that autograd keeps gradients.
torch::stable::Tensor empty_gradient(const torch::stable::Tensor& t);

}  // namespace fastvlp
