// Matmul of float32 matrices on CPU tensors: argument checks, outputs, one task per thread.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "../core/isa.h"
#include "../core/outputs.h"
#include "../core/scratch.h"
#include "../core/tensor_args.h"
#include "kernel.h"

namespace fastvlp {

FASTVLP_DEFINE_KERNELS(MatmulKernels, matmul)

namespace {

constexpr int64_t kGrain = 32;          // tasks are multiples of so many rows and columns
constexpr double kLeastWork = 1 << 20;  // multiply-adds that are worth a thread

bool matmul_available() { return matmul_kernels().multiply != nullptr; }

Matrix matrix_of(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == ScalarType::Float, name,
                  ": expected a float32 matrix");
  const bool plain = t.size(0) <= 1 || t.size(1) <= 1 || t.stride(0) == 1 || t.stride(1) == 1;
  STD_TORCH_CHECK(plain, name, ": expected unit stride along one dimension");
  return {floats_of(t), t.size(0) <= 1 ? 1 : t.stride(0), t.size(1) <= 1 ? 1 : t.stride(1)};
}

// How many tasks along the rows and along the columns, so that few floats are packed twice.
struct Grid {
  int64_t rows, cols;
  Grid(int64_t m, int64_t n, int64_t k) {
    const double work = static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
    const int64_t threads =
        std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(),
                                               static_cast<int64_t>(work / kLeastWork)));
    const int64_t row_blocks = (m + kGrain - 1) / kGrain, col_blocks = (n + kGrain - 1) / kGrain;
    rows = cols = 1;
    double best = 0;
    for (int64_t r = 1; r <= std::min(threads, row_blocks); ++r) {
      const int64_t c = std::min(threads / r, col_blocks);
      const int64_t tall = (row_blocks + r - 1) / r, wide = (col_blocks + c - 1) / c;
      // Blocks to multiply and, at about a sixth of the price for 1,000 columns, to pack.
      const double cost = static_cast<double>(tall) * wide + 5.0 * (tall + wide);
      if (best != 0 && cost >= best) continue;
      best = cost;
      rows = r, cols = c;
    }
  }
};

// Where part `i` of `parts` begins, a multiple of the grain.
int64_t begin_of(int64_t i, int64_t parts, int64_t size) {
  const int64_t blocks = (size + kGrain - 1) / kGrain;
  return std::min(size, blocks * i / parts * kGrain);
}

void run(const MatmulTask& whole) {
  if (whole.m == 0 || whole.n == 0) return;
  const MatmulKernels& kernels = matmul_kernels();
  const Grid grid(whole.m, whole.n, whole.k);
  torch::stable::parallel_for(0, grid.rows * grid.cols, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      MatmulTask t = whole;
      const int64_t row = begin_of(i / grid.cols, grid.rows, whole.m);
      const int64_t col = begin_of(i % grid.cols, grid.cols, whole.n);
      t.m = begin_of(i / grid.cols + 1, grid.rows, whole.m) - row;
      t.n = begin_of(i % grid.cols + 1, grid.cols, whole.n) - col;
      t.a.data += row * t.a.row;
      t.b.data += col * t.b.col;
      if (t.bias != nullptr) t.bias += col;
      t.c += row * t.c_row + col;
      const Buffer scratch = allocate_floats(kernels.scratch_floats(t.m, t.n, t.k));
      kernels.multiply(t, scratch.get());
    }
  });
}

MatmulTask task_of(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  MatmulTask t = {};
  t.a = matrix_of(a, "a"), t.b = matrix_of(b, "b");
  t.m = a.size(0), t.n = b.size(1), t.k = a.size(1);
  STD_TORCH_CHECK(b.size(0) == t.k, "b: expected ", t.k, " rows, got ", b.size(0));
  STD_TORCH_CHECK(matmul_available(), "matmul: this instruction set has no kernel");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1, "bias: expected 1 dimension, got ", bias->dim());
    t.bias = floats_of(*bias, t.n, "bias");
  }
  t.alpha = 1.0f;
  return t;
}

Tensor matmul(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  MatmulTask t = task_of(a, b, bias);
  Tensor out = empty_output(a, {t.m, t.n});
  t.c = mutable_floats_of(out);
  t.c_row = t.n;
  run(t);
  return out;
}

void add_matmul(const Tensor& a, const Tensor& b, double alpha, bool accumulate, Tensor out) {
  MatmulTask t = task_of(a, b, std::nullopt);
  STD_TORCH_CHECK(out.dim() == 2 && out.scalar_type() == ScalarType::Float && out.size(0) == t.m &&
                      out.size(1) == t.n && (t.n <= 1 || out.stride(1) == 1),
                  "out: expected float32 [", t.m, ", ", t.n, "] with unit stride along dim 1");
  t.alpha = static_cast<float>(alpha);
  t.accumulate = accumulate;
  t.c = mutable_floats_of(out);
  t.c_row = out.stride(0);
  run(t);
}

}  // namespace
}  // namespace fastvlp

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CPU, m) {
  m.impl("matmul", TORCH_BOX(&fastvlp::matmul));
  m.impl("add_matmul", TORCH_BOX(&fastvlp::add_matmul));
}

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CompositeExplicitAutograd, m) {
  m.impl("matmul_available", TORCH_BOX(&fastvlp::matmul_available));
}
