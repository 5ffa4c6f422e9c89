// The contrastive operators on CPU tensors: argument checks, outputs, and the call of the driver.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "../core/isa.h"
#include "../core/scratch.h"
#include "../core/tensor_args.h"
#include "driver.h"

namespace fastvlp {

FASTVLP_DEFINE_KERNELS(ContrastiveKernels, contrastive)

namespace {

ContrastiveProblem problem_of(const Tensor& x, const Tensor& y, const Tensor& scale, int64_t offset,
                              int64_t block_rows, int64_t block_cols) {
  ContrastiveProblem p = {};
  p.x = features_of(x, "x");
  p.y = features_of(y, "y");
  STD_TORCH_CHECK(x.size(1) == y.size(1), "x and y: expected the same width, got ", x.size(1),
                  " and ", y.size(1));
  STD_TORCH_CHECK(p.x.element == p.y.element, "x and y: expected the same dtype");
  STD_TORCH_CHECK(block_rows > 0 && block_rows % 32 == 0 && block_cols > 0 && block_cols % 32 == 0,
                  "block_rows and block_cols: expected positive multiples of 32");
  p.dim = x.size(1);
  p.scale = scalar_of(scale, "scale");
  p.offset = offset;
  p.block_rows = block_rows;
  p.block_cols = block_cols;
  return p;
}

void check_kept(const ContrastiveProblem& p, const Tensor& kept, int64_t keep_blocks) {
  STD_TORCH_CHECK(kept.scalar_type() == ScalarType::Float && kept.is_contiguous() &&
                      kept.numel() == keep_blocks * p.col_blocks() * tile_floats(p),
                  "kept: expected contiguous float32 tiles of keep_blocks row blocks");
}

// Log-sum-exps as floats and, past the last one, infinity: padding has no share in any softmax.
// Then what each float lacks; nothing where it is not finite.
Buffer padded(const Tensor& lse, const char* name, int64_t size) {
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Double && lse.is_contiguous(), name,
                  ": expected contiguous float64");
  const double* values = static_cast<const double*>(lse.const_data_ptr());
  Buffer out = allocate_floats(2 * size);
  for (int64_t i = 0; i < size; ++i) {
    const double value = i < lse.numel() ? values[i] : INFINITY;
    const float rounded = out.get()[i] = static_cast<float>(value);
    out.get()[size + i] = std::isfinite(rounded) ? static_cast<float>(value - rounded) : 0.0f;
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> statistics(const Tensor& x, const Tensor& y, const Tensor& scale,
                                              Tensor kept, int64_t offset, bool rows, bool cols,
                                              int64_t block_rows, int64_t block_cols,
                                              int64_t keep_blocks) {
  ContrastiveProblem p = problem_of(x, y, scale, offset, block_rows, block_cols);
  p.use_rows = rows;
  p.use_cols = cols;
  STD_TORCH_CHECK(keep_blocks >= 0 && keep_blocks <= p.row_blocks(),
                  "keep_blocks: expected 0 to the number of row blocks, got ", keep_blocks);
  check_kept(p, kept, keep_blocks);
  auto empty = [&](int64_t n, ScalarType type) {
    return torch::stable::new_empty(scale, {n}, type);
  };
  Tensor row_negatives = empty(rows ? p.x.rows : 0, ScalarType::Double);
  Tensor col_negatives = empty(cols ? p.y.rows : 0, ScalarType::Double);
  Tensor positive = empty(p.x.rows, ScalarType::Float);
  contrastive_statistics(
      p, contrastive_kernels(), run_parallel, torch::stable::get_num_threads(),
      mutable_floats_of(kept), keep_blocks, static_cast<double*>(row_negatives.mutable_data_ptr()),
      static_cast<double*>(col_negatives.mutable_data_ptr()), mutable_floats_of(positive));
  return {row_negatives, col_negatives, positive};
}

std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& x, const Tensor& y, const Tensor& scale,
                                             const Tensor& row_lse, const Tensor& col_lse,
                                             const Tensor& positive_gradient, const Tensor& weights,
                                             const Tensor& kept, int64_t offset, int64_t block_rows,
                                             int64_t block_cols, int64_t keep_blocks,
                                             int64_t chunk_rows, int64_t chunk_cols) {
  ContrastiveProblem p = problem_of(x, y, scale, offset, block_rows, block_cols);
  p.use_rows = row_lse.numel() > 0;
  p.use_cols = col_lse.numel() > 0;
  STD_TORCH_CHECK(!p.use_rows || row_lse.numel() == p.x.rows, "row_lse: expected one per row of x");
  STD_TORCH_CHECK(!p.use_cols || col_lse.numel() == p.y.rows, "col_lse: expected one per row of y");
  STD_TORCH_CHECK(positive_gradient.numel() == p.x.rows,
                  "positive_gradient: expected one per row of x");
  STD_TORCH_CHECK(weights.numel() == 2, "weights: expected 2 values");
  check_kept(p, kept, keep_blocks);
  STD_TORCH_CHECK(chunk_rows > 0 && chunk_cols > 0, "chunk_rows, chunk_cols: expected at least 1");
  const int64_t row_count = p.row_blocks() * block_rows, col_count = p.col_blocks() * block_cols;
  const Buffer padded_rows = padded(row_lse, "row_lse", row_count);
  const Buffer padded_cols = padded(col_lse, "col_lse", col_count);
  p.row_lse = padded_rows.get();
  p.row_rest = p.row_lse + row_count;
  p.col_lse = padded_cols.get();
  p.col_rest = p.col_lse + col_count;
  p.row_weight = floats_of(weights)[0];
  p.col_weight = floats_of(weights)[1];
  p.positive_gradient = floats_of(positive_gradient);
  Tensor dx = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Tensor dy = torch::stable::new_empty(y, {y.size(0), y.size(1)});
  SigmoidSums unused = {0.0, 0.0};
  GradientPlan plan = {const_cast<float*>(floats_of(kept)), keep_blocks, chunk_rows, chunk_cols};
  const double scale_gradient = contrastive_gradients(
      p, contrastive_kernels(), run_parallel, plan, {dx.mutable_data_ptr(), p.x.element},
      {dy.mutable_data_ptr(), p.y.element}, &unused);
  return {dx, dy, scalar_tensor(scale, scale_gradient)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid(const Tensor& x, const Tensor& y,
                                                           const Tensor& scale, const Tensor& bias,
                                                           double weight, int64_t offset,
                                                           bool gradients, int64_t block_rows,
                                                           int64_t block_cols, int64_t chunk_rows,
                                                           int64_t chunk_cols) {
  ContrastiveProblem p = problem_of(x, y, scale, offset, block_rows, block_cols);
  STD_TORCH_CHECK(chunk_rows > 0 && chunk_cols > 0, "chunk_rows, chunk_cols: expected at least 1");
  p.loss = Loss::kSigmoid;
  p.bias = scalar_of(bias, "bias");
  p.row_weight = static_cast<float>(weight);
  const int64_t kept_rows = gradients ? 1 : 0;
  Tensor dx = torch::stable::new_empty(x, {x.size(0) * kept_rows, x.size(1)});
  Tensor dy = torch::stable::new_empty(y, {y.size(0) * kept_rows, y.size(1)});
  SigmoidSums sums = {0.0, 0.0};
  GradientPlan plan = {nullptr, 0, chunk_rows, chunk_cols};
  GradientOutput dx_out = {gradients ? dx.mutable_data_ptr() : nullptr, p.x.element};
  GradientOutput dy_out = {gradients ? dy.mutable_data_ptr() : nullptr, p.y.element};
  const double scale_gradient =
      contrastive_gradients(p, contrastive_kernels(), run_parallel, plan, dx_out, dy_out, &sums);
  return {scalar_tensor(scale, sums.loss * weight), dx, dy, scalar_tensor(scale, scale_gradient),
          scalar_tensor(scale, sums.gradient * weight)};
}

std::string cpu_instruction_sets() {
  std::string names;
  for (const Isa isa : available_isas())
    names += names.empty() ? name_of(isa) : std::string(",") + name_of(isa);
  return names;
}

}  // namespace
}  // namespace fastvlp

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CPU, m) {
  m.impl("contrastive_statistics", TORCH_BOX(&fastvlp::statistics));
  m.impl("contrastive_gradients", TORCH_BOX(&fastvlp::gradients));
  m.impl("contrastive_sigmoid", TORCH_BOX(&fastvlp::sigmoid));
}

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_sets", TORCH_BOX(&fastvlp::cpu_instruction_sets));
  m.impl("release_cpu_buffers", TORCH_BOX(&fastvlp::release_buffers));
}
