// The contrastive matmuls of float32 by bf16x3 emulation: logits and gradients of one tile.
// Operands are split for the matmul that reads them and not kept.
#pragma once

#include "../gemm/bf16x3_pack.h"
#include "gradient.h"

#if defined(__AMX_BF16__)

namespace {

struct SplitScratch {
  uint32_t* a;        // kSplitGroup rows of A
  float* columns;     // 32 columns of the gradient of a group
  float* transposed;  // 16 rows of those
  float* block;       // of a matmul
  static constexpr int64_t kColumnStride = kSplitGroup + 16;
};

inline int64_t split_group_words(const ContrastiveProblem& p) {
  return split_words(kSplitGroup, std::max({p.dim, p.block_rows, p.block_cols}));
}

// A block of features packed for a gradient matmul: what its features were multiplied by, in front
// of the operand.
constexpr int64_t kPackedHeader = 16;

inline int64_t packed_split_floats(const ContrastiveProblem& p, int64_t rows) {
  return kPackedHeader + split_words(p.dim, rows);
}

inline void pack_split(const Features& m, int64_t begin, int64_t count, int64_t dim,
                       float* packed) {
  packed[0] = factor_of_rows(m, begin, count, dim);
  split_along_rows(Operand::kB, m, begin, count, dim, packed[0],
                   reinterpret_cast<uint32_t*>(packed + kPackedHeader));
}

// tile = scale * y x^T for the columns of a block; x has been split, times `x_factor`.
inline void split_logits(const ContrastiveProblem& p, int64_t first_col, int64_t cols,
                         int64_t padded_rows, const uint32_t* x, float x_factor,
                         const SplitScratch& s, float* tile) {
  const int64_t stride = fastvlp::tile_stride(p);
  for (int64_t j = 0; j < cols; j += kSplitGroup) {
    const int64_t count = std::min(kSplitGroup, cols - j);
    const float factor = factor_of_rows(p.y, first_col + j, count, p.dim);
    split_along_dim(Operand::kA, p.y, first_col + j, count, p.dim, factor, s.a);
    multiply_split(s.a, x, steps_of(p.dim), tile + j * stride, stride, round_up(count, kStepSide),
                   padded_rows / kStepSide, quotient(p.scale, x_factor, factor), false, s.block);
  }
}

// Logit gradients are computed times a power of two, for which the exponentials that are not zero
// are above what tiles flush.
inline float weight_factor(const ContrastiveProblem& p) {
  return factor_to(std::max(std::fabs(p.row_weight), std::fabs(p.col_weight)), 12);
}

// Rows [first, first + count) of the logit gradient along `cols` columns, as A.
inline void split_gradient_rows(const TileGradient& gradient, int64_t first, int64_t count,
                                int64_t cols, const SplitScratch& s) {
  constexpr int64_t stride = SplitScratch::kColumnStride;
  const int64_t steps = steps_of(cols);
  for (int64_t j = 0; j < cols; j += kStepDepth) {
    for (int64_t c = 0; c < kStepDepth; ++c)
      if (j + c < cols)
        gradient.part(j + c, first, count, s.columns + c * stride);
      else
        std::memset(s.columns + c * stride, 0, count * 4);
    split_transposed_step(s.columns, stride, count, 1.0f, j / kStepDepth, steps, s.a, s.transposed);
  }
}

// Columns [first, first + count), zero up to a multiple of 32, along n rows, as A.
inline void split_gradient_columns(const TileGradient& gradient, int64_t first, int64_t count,
                                   int64_t n, float* column, uint32_t* a) {
  const int64_t steps = n / kStepDepth;
  for (int64_t j = 0; j < round_up(count, kStepSide); ++j) {
    uint32_t* out = a + j / kStepSide * steps * kStepWords + j % kStepSide * kTile;
    if (j < count)
      gradient.part(first + j, 0, n, column);
    else
      std::memset(column, 0, n * 4);
    for (int64_t i = 0; i < n; i += kStepDepth, out += kStepWords)
      store_neighbours(load(column + i), load(column + i + kLanes), out);
  }
}

}  // namespace

#endif
