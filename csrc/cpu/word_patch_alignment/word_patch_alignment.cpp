// The word-patch alignment on CPU tensors: argument checks, outputs, one task per pair.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../core/isa.h"
#include "../core/outputs.h"
#include "../core/scratch.h"
#include "kernel.h"

namespace fastvlp {

FASTVLP_DEFINE_KERNELS(WordPatchAlignmentKernels, word_patch_alignment)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Element checked_element(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
      ": expected float32, bfloat16 or float16");
  STD_TORCH_CHECK(t.dim() == 3, name, ": expected 3 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.size(2) <= 1 || t.stride(2) == 1, name, ": expected unit stride along dim 2");
  if (type == ScalarType::Float) return Element::kFloat32;
  return type == ScalarType::Half ? Element::kFloat16 : Element::kBFloat16;
}

void check_contiguous(const Tensor& t, const char* name, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == numel, name,
                  ": expected a contiguous tensor of ", numel, " elements of the right dtype");
}

// One side of all pairs.
struct Side {
  Side(const Tensor& features, const char* name)
      : data(static_cast<const char*>(features.const_data_ptr())),
        element(checked_element(features, name)),
        pairs(features.size(0)),
        rows(features.size(1)),
        pair_stride(features.stride(0)),
        row_stride(features.stride(1)) {}

  AlignmentSide pair(int64_t b) const {
    return {{data + b * pair_stride * bytes_of(element), rows, row_stride, element},
            padding == nullptr ? nullptr : padding + b * rows,
            results + b * rows,
            results + (pairs + b) * rows};
  }

  const char* data;
  Element element;
  int64_t pairs, rows, pair_stride, row_stride;
  const bool* padding = nullptr;
  float* results = nullptr;  // factors, then shares
};

void check_sides(const Tensor& x, const Tensor& y, const Side& left, const Side& right) {
  STD_TORCH_CHECK(x.size(0) == y.size(0) && x.size(2) == y.size(2),
                  "x and y: expected the same number of pairs and the same width");
  STD_TORCH_CHECK(left.element == right.element, "x and y: expected the same dtype");
}

// body(b, scratch) for every pair b, in parallel; each thread has its scratch.
template <class Body>
void for_each_pair(int64_t pairs, int64_t scratch_floats, const Body& body) {
  const std::function<void(int64_t, int64_t)> run = [&](int64_t begin, int64_t end) {
    const Buffer scratch = allocate_floats(scratch_floats);
    for (int64_t b = begin; b < end; ++b) body(b, scratch.get());
  };
  torch::stable::parallel_for(0, pairs, 1, run);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> word_patch_alignment(const Tensor& x, const Tensor& y,
                                                                const Tensor& x_padding,
                                                                const Tensor& y_padding,
                                                                double beta, int64_t iterations,
                                                                int64_t inner) {
  Side left(x, "x"), right(y, "y");
  check_sides(x, y, left, right);
  check_contiguous(x_padding, "x_padding", ScalarType::Bool, left.pairs * left.rows);
  check_contiguous(y_padding, "y_padding", ScalarType::Bool, left.pairs * right.rows);
  STD_TORCH_CHECK(iterations > 0 && inner > 0, "iterations and inner: expected at least 1");
  auto empty = [&](torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    return torch::stable::new_empty(x, sizes, ScalarType::Float);
  };
  Tensor distance = empty({left.pairs});
  Tensor plan = empty({left.pairs, left.rows, right.rows});
  Tensor x_rows = empty({2, left.pairs, left.rows});
  Tensor y_rows = empty({2, left.pairs, right.rows});
  left.padding = static_cast<const bool*>(x_padding.const_data_ptr());
  right.padding = static_cast<const bool*>(y_padding.const_data_ptr());
  left.results = static_cast<float*>(x_rows.mutable_data_ptr());
  right.results = static_cast<float*>(y_rows.mutable_data_ptr());
  const AlignmentProblem p = {left.rows,  right.rows, x.size(2), static_cast<float>(beta),
                              iterations, inner};
  const WordPatchAlignmentKernels& kernels = word_patch_alignment_kernels();
  float* distances = static_cast<float*>(distance.mutable_data_ptr());
  float* plans = static_cast<float*>(plan.mutable_data_ptr());
  for_each_pair(left.pairs, kernels.scratch_floats(p), [&](int64_t b, float* scratch) {
    const AlignmentPair pair = {left.pair(b), right.pair(b), plans + b * p.x_rows * p.y_rows};
    distances[b] = kernels.align(p, pair, scratch);
  });
  return {distance, plan, x_rows, y_rows};
}

std::tuple<Tensor, Tensor> word_patch_alignment_gradients(const Tensor& upstream, const Tensor& x,
                                                          const Tensor& y, const Tensor& plan,
                                                          const Tensor& x_rows,
                                                          const Tensor& y_rows) {
  Side left(x, "x"), right(y, "y");
  check_sides(x, y, left, right);
  check_contiguous(upstream, "upstream", ScalarType::Float, left.pairs);
  check_contiguous(plan, "plan", ScalarType::Float, left.pairs * left.rows * right.rows);
  check_contiguous(x_rows, "x_rows", ScalarType::Float, 2 * left.pairs * left.rows);
  check_contiguous(y_rows, "y_rows", ScalarType::Float, 2 * left.pairs * right.rows);
  Tensor dx = empty_output(x), dy = empty_output(y);
  // The kernels only read what the forward pass left.
  auto floats = [](const Tensor& t) {
    return const_cast<float*>(static_cast<const float*>(t.const_data_ptr()));
  };
  left.results = floats(x_rows);
  right.results = floats(y_rows);
  const AlignmentProblem p = {left.rows, right.rows, x.size(2), 1.0f, 1, 1};
  const WordPatchAlignmentKernels& kernels = word_patch_alignment_kernels();
  char* dx_data = static_cast<char*>(dx.mutable_data_ptr());
  char* dy_data = static_cast<char*>(dy.mutable_data_ptr());
  const int64_t row_bytes = p.dim * bytes_of(left.element);
  for_each_pair(left.pairs, kernels.scratch_floats(p), [&](int64_t b, float* scratch) {
    const AlignmentPair pair = {left.pair(b), right.pair(b),
                                floats(plan) + b * p.x_rows * p.y_rows};
    kernels.gradients(p, pair,
                      {floats(upstream)[b], dx_data + b * p.x_rows * row_bytes,
                       dy_data + b * p.y_rows * row_bytes},
                      scratch);
  });
  return {dx, dy};
}

}  // namespace
}  // namespace fastvlp

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CPU, m) {
  m.impl("word_patch_alignment", TORCH_BOX(&fastvlp::word_patch_alignment));
  m.impl("word_patch_alignment_gradients", TORCH_BOX(&fastvlp::word_patch_alignment_gradients));
}
