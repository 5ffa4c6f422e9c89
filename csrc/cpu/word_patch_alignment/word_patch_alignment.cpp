// The word-patch alignment on CPU tensors: argument checks, outputs, one task per pair.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../core/isa.h"
#include "../core/outputs.h"
#include "../core/scratch.h"
#include "../core/tensor_args.h"
#include "kernel.h"

namespace fastvlp {

FASTVLP_DEFINE_KERNELS(WordPatchAlignmentKernels, word_patch_alignment)

namespace {

Element checked_element(const Tensor& t, const char* name) {
  const Element element = element_of(t, name);
  STD_TORCH_CHECK(t.dim() == 3, name, ": expected 3 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.size(2) <= 1 || t.stride(2) == 1, name, ": expected unit stride along dim 2");
  return element;
}

// The kernels only read what the forward pass left.
float* left_by_forward(const Tensor& t, int64_t n, const char* name) {
  return const_cast<float*>(floats_of(t, n, name));
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
  run_parallel(pairs, [&](int64_t begin, int64_t end) {
    const Buffer scratch = allocate_floats(scratch_floats);
    for (int64_t b = begin; b < end; ++b) body(b, scratch.get());
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> word_patch_alignment(const Tensor& x, const Tensor& y,
                                                                const Tensor& x_padding,
                                                                const Tensor& y_padding,
                                                                double beta, int64_t iterations,
                                                                int64_t inner) {
  Side left(x, "x"), right(y, "y");
  check_sides(x, y, left, right);
  left.padding = bools_of(x_padding, left.pairs * left.rows, "x_padding");
  right.padding = bools_of(y_padding, left.pairs * right.rows, "y_padding");
  STD_TORCH_CHECK(iterations > 0 && inner > 0, "iterations and inner: expected at least 1");
  auto empty = [](const std::vector<int64_t>& sizes) {
    return empty_tensor(sizes, aoti_torch_dtype_float32());
  };
  Tensor distance = empty({left.pairs});
  Tensor plan = empty({left.pairs, left.rows, right.rows});
  Tensor x_rows = empty({2, left.pairs, left.rows});
  Tensor y_rows = empty({2, left.pairs, right.rows});
  left.results = mutable_floats_of(x_rows);
  right.results = mutable_floats_of(y_rows);
  const AlignmentProblem p = {left.rows,  right.rows, x.size(2), static_cast<float>(beta),
                              iterations, inner};
  const WordPatchAlignmentKernels& kernels = word_patch_alignment_kernels();
  float* distances = mutable_floats_of(distance);
  float* plans = mutable_floats_of(plan);
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
  const float* upstreams = floats_of(upstream, left.pairs, "upstream");
  float* plans = left_by_forward(plan, left.pairs * left.rows * right.rows, "plan");
  left.results = left_by_forward(x_rows, 2 * left.pairs * left.rows, "x_rows");
  right.results = left_by_forward(y_rows, 2 * left.pairs * right.rows, "y_rows");
  Tensor dx = empty_output(x), dy = empty_output(y);
  const AlignmentProblem p = {left.rows, right.rows, x.size(2), 1.0f, 1, 1};
  const WordPatchAlignmentKernels& kernels = word_patch_alignment_kernels();
  char* dx_data = static_cast<char*>(dx.mutable_data_ptr());
  char* dy_data = static_cast<char*>(dy.mutable_data_ptr());
  const int64_t row_bytes = p.dim * bytes_of(left.element);
  for_each_pair(left.pairs, kernels.scratch_floats(p), [&](int64_t b, float* scratch) {
    const AlignmentPair pair = {left.pair(b), right.pair(b), plans + b * p.x_rows * p.y_rows};
    kernels.gradients(
        p, pair,
        {upstreams[b], dx_data + b * p.x_rows * row_bytes, dy_data + b * p.y_rows * row_bytes},
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
