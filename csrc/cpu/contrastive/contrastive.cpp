// The contrastive operators on CPU tensors: argument checks, outputs, and the call of the driver.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../core/isa.h"
#include "../core/outputs.h"
#include "../core/scratch.h"
#include "../core/tensor_args.h"
#include "driver.h"
#include "pairs.h"

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

void check_keep_blocks(const ContrastiveProblem& p, int64_t keep_blocks) {
  STD_TORCH_CHECK(keep_blocks >= 0 && keep_blocks <= p.row_blocks(),
                  "keep_blocks: expected 0 to the number of row blocks, got ", keep_blocks);
}

const double* doubles_of(const Tensor& t, int64_t n, const char* name) {
  return values_of<double>(t, ScalarType::Double, n, name, "float64");
}

// Log-sum-exps as floats and, past the last one, infinity: padding has no share in any softmax.
// Then what each float lacks; nothing where it is not finite.
class PaddedLse {
 public:
  // The first `n` are for `set`.
  PaddedLse(int64_t n, int64_t size) : size_(size), floats_(allocate_floats(2 * size)) {
    std::fill_n(floats_.get() + n, size - n, INFINITY);
    std::fill_n(floats_.get() + size + n, size - n, 0.0f);
  }
  PaddedLse(const double* lse, int64_t n, int64_t size) : PaddedLse(n, size) {
    for (int64_t i = 0; i < n; ++i) set(i, lse[i]);
  }
  void set(int64_t i, double lse) {
    const float rounded = floats_.get()[i] = static_cast<float>(lse);
    floats_.get()[size_ + i] = std::isfinite(rounded) ? static_cast<float>(lse - rounded) : 0.0f;
  }
  const float* rounded() const { return floats_.get(); }
  const float* rest() const { return floats_.get() + size_; }

 private:
  int64_t size_;
  Buffer floats_;
};

void run_statistics(const ContrastiveProblem& p, Tensor& kept, int64_t keep_blocks,
                    double* row_negatives, double* col_negatives, float* positive) {
  check_keep_blocks(p, keep_blocks);
  check_kept(p, kept, keep_blocks);
  contrastive_statistics(p, contrastive_kernels(), run_parallel, torch::stable::get_num_threads(),
                         mutable_floats_of(kept), keep_blocks, row_negatives, col_negatives,
                         positive);
}

std::tuple<Tensor, Tensor, Tensor> statistics(const Tensor& x, const Tensor& y, const Tensor& scale,
                                              Tensor kept, int64_t offset, bool rows, bool cols,
                                              int64_t block_rows, int64_t block_cols,
                                              int64_t keep_blocks) {
  ContrastiveProblem p = problem_of(x, y, scale, offset, block_rows, block_cols);
  p.use_rows = rows;
  p.use_cols = cols;
  Tensor row_negatives = empty_tensor({rows ? p.x.rows : 0}, aoti_torch_dtype_float64());
  Tensor col_negatives = empty_tensor({cols ? p.y.rows : 0}, aoti_torch_dtype_float64());
  Tensor positive = empty_tensor({p.x.rows}, aoti_torch_dtype_float32());
  run_statistics(p, kept, keep_blocks, static_cast<double*>(row_negatives.mutable_data_ptr()),
                 static_cast<double*>(col_negatives.mutable_data_ptr()),
                 mutable_floats_of(positive));
  return {row_negatives, col_negatives, positive};
}

// The gradients of a problem that has its weights and the positives' gradients.
std::tuple<Tensor, Tensor, Tensor> run_gradients(ContrastiveProblem& p, const Tensor& x,
                                                 const Tensor& y, const PaddedLse& rows,
                                                 const PaddedLse& cols, const Tensor& kept,
                                                 int64_t keep_blocks, int64_t chunk_rows,
                                                 int64_t chunk_cols) {
  check_kept(p, kept, keep_blocks);
  STD_TORCH_CHECK(chunk_rows > 0 && chunk_cols > 0, "chunk_rows, chunk_cols: expected at least 1");
  p.row_lse = rows.rounded();
  p.row_rest = rows.rest();
  p.col_lse = cols.rounded();
  p.col_rest = cols.rest();
  Tensor dx = empty_tensor({x.size(0), x.size(1)}, dtype_of(x));
  Tensor dy = empty_tensor({y.size(0), y.size(1)}, dtype_of(y));
  SigmoidSums unused = {0.0, 0.0};
  GradientPlan plan = {const_cast<float*>(floats_of(kept)), keep_blocks, chunk_rows, chunk_cols};
  const double scale_gradient = contrastive_gradients(
      p, contrastive_kernels(), run_parallel, plan, {dx.mutable_data_ptr(), p.x.element},
      {dy.mutable_data_ptr(), p.y.element}, &unused);
  return {dx, dy, scalar_tensor(scale_gradient)};
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
  const int64_t rows = p.use_rows ? p.x.rows : 0, cols = p.use_cols ? p.y.rows : 0;
  const PaddedLse padded_rows(doubles_of(row_lse, rows, "row_lse"), rows,
                              p.row_blocks() * block_rows);
  const PaddedLse padded_cols(doubles_of(col_lse, cols, "col_lse"), cols,
                              p.col_blocks() * block_cols);
  STD_TORCH_CHECK(positive_gradient.numel() == p.x.rows,
                  "positive_gradient: expected one per row of x");
  STD_TORCH_CHECK(weights.numel() == 2, "weights: expected 2 values");
  p.row_weight = floats_of(weights)[0];
  p.col_weight = floats_of(weights)[1];
  p.positive_gradient = floats_of(positive_gradient);
  return run_gradients(p, x, y, padded_rows, padded_cols, kept, keep_blocks, chunk_rows,
                       chunk_cols);
}

ContrastiveProblem pairs_problem_of(const Tensor& x, const Tensor& y, const Tensor& scale,
                                    bool rows, bool cols, int64_t block_rows, int64_t block_cols) {
  ContrastiveProblem p = problem_of(x, y, scale, 0, block_rows, block_cols);
  STD_TORCH_CHECK(p.x.rows == p.y.rows && p.x.rows > 0,
                  "x and y: expected the same number of rows, at least one");
  STD_TORCH_CHECK(rows || cols, "rows and cols: expected a direction that has a loss");
  p.use_rows = rows;
  p.use_cols = cols;
  return p;
}

// `values` [directions + 1, n], the last row of which is the positives'.
PairStatistics pairs_of(const ContrastiveProblem& p, const double* values) {
  const int64_t n = p.x.rows, directions = p.use_rows + p.use_cols;
  return {p.use_rows ? values : nullptr, p.use_cols ? values + (directions - 1) * n : nullptr,
          values + directions * n, n};
}

std::tuple<Tensor, Tensor> loss(const Tensor& x, const Tensor& y, const Tensor& scale, Tensor kept,
                                bool rows, bool cols, int64_t block_rows, int64_t block_cols,
                                int64_t keep_blocks) {
  const ContrastiveProblem p = pairs_problem_of(x, y, scale, rows, cols, block_rows, block_cols);
  const int64_t n = p.x.rows, directions = rows + cols;
  Tensor found = empty_tensor({directions + 1, n}, aoti_torch_dtype_float64());
  double* values = static_cast<double*>(found.mutable_data_ptr());
  const Buffer positive = allocate_floats(n);
  run_statistics(p, kept, keep_blocks, values, values + (directions - 1) * n, positive.get());
  std::copy_n(positive.get(), n, values + directions * n);
  return {scalar_tensor(mean_loss(run_parallel, pairs_of(p, values))), found};
}

std::tuple<Tensor, Tensor, Tensor> loss_gradients(const Tensor& x, const Tensor& y,
                                                  const Tensor& scale, const Tensor& found,
                                                  const Tensor& upstream, const Tensor& kept,
                                                  bool rows, bool cols, int64_t block_rows,
                                                  int64_t block_cols, int64_t keep_blocks,
                                                  int64_t chunk_rows, int64_t chunk_cols) {
  ContrastiveProblem p = pairs_problem_of(x, y, scale, rows, cols, block_rows, block_cols);
  const int64_t n = p.x.rows, directions = rows + cols;
  const PairStatistics pairs = pairs_of(p, doubles_of(found, (directions + 1) * n, "statistics"));
  const float share = scalar_of(upstream, "upstream") / static_cast<float>(n * directions);
  PaddedLse padded_rows(rows ? n : 0, p.row_blocks() * block_rows);
  PaddedLse padded_cols(cols ? n : 0, p.col_blocks() * block_cols);
  const Buffer positive_gradient = allocate_floats(n);
  for_pairs(run_parallel, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double positive = pairs.positive[i];
      double missing = 0.0;
      if (rows) {
        padded_rows.set(i, log_add_exp(pairs.row_negatives[i], positive));
        missing += missing_probability(pairs.row_negatives[i], positive);
      }
      if (cols) {
        padded_cols.set(i, log_add_exp(pairs.col_negatives[i], positive));
        missing += missing_probability(pairs.col_negatives[i], positive);
      }
      positive_gradient.get()[i] = static_cast<float>(-share * missing);
    }
  });
  p.row_weight = p.col_weight = share;
  p.positive_gradient = positive_gradient.get();
  return run_gradients(p, x, y, padded_rows, padded_cols, kept, keep_blocks, chunk_rows,
                       chunk_cols);
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
  Tensor dx = empty_tensor({x.size(0) * kept_rows, x.size(1)}, dtype_of(x));
  Tensor dy = empty_tensor({y.size(0) * kept_rows, y.size(1)}, dtype_of(y));
  SigmoidSums sums = {0.0, 0.0};
  GradientPlan plan = {nullptr, 0, chunk_rows, chunk_cols};
  GradientOutput dx_out = {gradients ? dx.mutable_data_ptr() : nullptr, p.x.element};
  GradientOutput dy_out = {gradients ? dy.mutable_data_ptr() : nullptr, p.y.element};
  const double scale_gradient =
      contrastive_gradients(p, contrastive_kernels(), run_parallel, plan, dx_out, dy_out, &sums);
  return {scalar_tensor(sums.loss * weight), dx, dy, scalar_tensor(scale_gradient),
          scalar_tensor(sums.gradient * weight)};
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
  m.impl("contrastive_loss", TORCH_BOX(&fastvlp::loss));
  m.impl("contrastive_loss_gradients", TORCH_BOX(&fastvlp::loss_gradients));
  m.impl("contrastive_sigmoid", TORCH_BOX(&fastvlp::sigmoid));
}

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_sets", TORCH_BOX(&fastvlp::cpu_instruction_sets));
  m.impl("release_cpu_buffers", TORCH_BOX(&fastvlp::release_buffers));
}
