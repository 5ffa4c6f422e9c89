// What the contrastive driver (baseline code, owns memory and threads) and the per-instruction-set
// kernels (no allocation, no threads, no torch) say to each other.
#pragma once

#include <cstdint>

#include "../core/matrix_view.h"

namespace fastvlp {

enum class Loss { kSoftmax, kSigmoid };

// The logits z[i, j] = scale * <x_i, y_j> + bias, cut into blocks of block_rows x block_cols. The
// positive of row i is column i + offset.
struct ContrastiveProblem {
  Features x;
  Features y;
  int64_t dim;
  float scale;
  float bias;
  int64_t offset;
  Loss loss;
  bool use_rows;
  bool use_cols;
  int64_t block_rows;  // both multiples of 32
  int64_t block_cols;
  // For gradients only. The log-sum-exps, over all logits, are padded to whole blocks with
  // infinity: exp(z - lse) is 0 there whatever z. The rest is what each has lost to its rounding.
  const float* row_lse;
  const float* row_rest;
  const float* col_lse;
  const float* col_rest;
  float row_weight;  // of exp(z - row_lse); for the sigmoid loss, of every element
  float col_weight;
  const float* positive_gradient;  // [x.rows], with respect to the positives' logits; softmax only

  int64_t row_blocks() const { return (x.rows + block_rows - 1) / block_rows; }
  int64_t col_blocks() const { return (y.rows + block_cols - 1) / block_cols; }
  int64_t rows_in(int64_t i) const {
    const int64_t left = x.rows - i * block_rows;
    return left < block_rows ? left : block_rows;
  }
  int64_t cols_in(int64_t j) const {
    const int64_t left = y.rows - j * block_cols;
    return left < block_cols ? left : block_cols;
  }
};

// A tile holds the logits of one block as [block_cols][tile_stride]: column-major, because the rows
// are the packed operand of the matmul. The 16 extra floats keep neighbouring columns of a
// power-of-two block out of the same cache sets.
inline int64_t tile_stride(const ContrastiveProblem& p) { return p.block_rows + 16; }
inline int64_t tile_floats(const ContrastiveProblem& p) { return p.block_cols * tile_stride(p); }

// Sums that the sigmoid loss collects while its logits are fresh.
struct SigmoidSums {
  double loss;
  double gradient;
};

struct ContrastiveKernels {
  // Bytes of scratch (64-byte aligned) that one call of any function below needs.
  int64_t (*scratch_bytes)(const ContrastiveProblem&);
  // Row length, in floats, of the gradient accumulators: dim rounded up to whole vectors.
  int64_t (*padded_dim)(const ContrastiveProblem&);
  // Floats that a block of `rows` features takes when packed for the gradient matmuls.
  int64_t (*packed_floats)(const ContrastiveProblem&, int64_t rows);
  // Packs one block of y (for row_gradient) or of x (for col_gradient).
  void (*pack_cols)(const ContrastiveProblem&, int64_t block, void* scratch, float* packed);
  void (*pack_rows)(const ContrastiveProblem&, int64_t block, void* scratch, float* packed);
  // One block of rows against all columns. `tiles`, when not null, receives its col_blocks() tiles.
  // Positives are left out of the log-sum-exps, and of the tiles. Row results are for this block
  // alone; col_max and col_sum (padded to whole blocks) are merged into in place.
  void (*statistics)(const ContrastiveProblem&, int64_t block, void* scratch, float* tiles,
                     double* row_negatives, float* positive, float* col_max, float* col_sum);
  // accumulator[block_rows][padded_dim] += (logit gradient) * y over column blocks [begin, end),
  // whose tiles and packed features lie one after another at `tiles`, computed first when `fresh`,
  // and `packed`. A null accumulator only computes; `sums` is added to for the sigmoid loss when
  // `fresh`.
  void (*row_gradient)(const ContrastiveProblem&, int64_t block, int64_t begin, int64_t end,
                       bool fresh, void* scratch, float* tiles, const float* packed,
                       float* accumulator, SigmoidSums* sums);
  // accumulator[block_cols][padded_dim] += (logit gradient)^T * x over row blocks [begin, end),
  // whose tiles lie `tile_step` floats apart at `tiles`.
  void (*col_gradient)(const ContrastiveProblem&, int64_t block, int64_t begin, int64_t end,
                       void* scratch, const float* tiles, int64_t tile_step, const float* packed,
                       float* accumulator);
};

}  // namespace fastvlp
