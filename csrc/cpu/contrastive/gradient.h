// Gradients w.r.t. a tile of logits, and their matmuls with the features.
#pragma once

#include <cmath>

#include "../../common/contrastive_math.h"
#include "../gemm/pack.h"
#include "../gemm/policy.h"
#include "rows.h"

namespace {

using fastvlp::Loss;

// A softmax tile is stored either as logits or, where one shift serves all of it, as
// exp(z - shift): then no pass after the first one has to take exponentials. The shift sits in the
// padding of the tile's first column; NaN there means logits.
// Positives are no part of such a tile: their gradients come from outside. Those of the sigmoid
// loss wait in the padding of their columns.
float& shift_of(const ContrastiveProblem& p, float* tile) { return tile[p.block_rows]; }
float shift_of(const ContrastiveProblem& p, const float* tile) { return tile[p.block_rows]; }
float& positive_of(const ContrastiveProblem& p, float* column) { return column[p.block_rows + 1]; }
float positive_of(const ContrastiveProblem& p, const float* column) {
  return column[p.block_rows + 1];
}

// The row of a block that holds the positive of a column of another; may lie outside.
inline int64_t positive_row(const ContrastiveProblem& p, int64_t row_block, int64_t col_block,
                            int64_t column) {
  return col_block * p.block_cols + column - p.offset - row_block * p.block_rows;
}

// Computes the logit gradients of one tile times a factor, column by column.
class TileGradient {
 public:
  // `row_factor` is scratch for block_rows floats.
  TileGradient(const ContrastiveProblem& p, int64_t row_block, int64_t col_block, const float* tile,
               float* row_factor, float factor = 1.0f)
      : p_(p),
        tile_(tile),
        first_row_(row_block * p.block_rows),
        first_col_(col_block * p.block_cols),
        rows_(p.rows_in(row_block)),
        n_(round_up(rows_, kPanel)),
        shift_(p.loss == Loss::kSoftmax ? shift_of(p, tile) : __builtin_nanf("")),
        factor_(factor),
        row_weight_(p.row_weight * factor),
        col_weight_(p.col_weight * factor),
        row_factor_(row_factor) {
    if (shift_ != shift_) return;
    for (int64_t i = 0; i < n_; i += kLanes)
      store(row_factor + i, p.use_rows ? exp((shift_ - load(p.row_lse + first_row_ + i)) -
                                             load(p.row_rest + first_row_ + i)) *
                                             row_weight_
                                       : Vec{});
  }

  void column(int64_t j, float* g) const { part(j, 0, n_, g); }

  // Rows [first, first + n) of column j; both are multiples of kLanes.
  void part(int64_t j, int64_t first, int64_t n, float* g) const {
    const float* column = tile_ + j * fastvlp::tile_stride(p_);
    const float* z = column + first;
    const float* row_lse = p_.row_lse + first_row_ + first;
    const float* row_rest = p_.row_rest + first_row_ + first;
    const int64_t col = first_col_ + j;
    // A column's rest goes into its weight: exp(-rest) is 1 - rest, so small is that.
    const float col_weight = p_.use_cols ? col_weight_ - col_weight_ * p_.col_rest[col] : 0.0f;
    if (p_.loss == Loss::kSigmoid)
      sigmoid_gradient(z, n, p_.bias, row_weight_, g);
    else if (shift_ == shift_)
      shifted_softmax_gradient(z, n, row_factor_ + first,
                               p_.use_cols ? col_weight * std::exp(shift_ - p_.col_lse[col]) : 0.0f,
                               g);
    else if (p_.use_rows && p_.use_cols)
      softmax_gradient<true, true>(z, n, row_lse, row_rest, p_.col_lse[col], row_weight_,
                                   col_weight, g);
    else if (p_.use_rows)
      softmax_gradient<true, false>(z, n, row_lse, row_rest, 0.0f, row_weight_, 0.0f, g);
    else
      softmax_gradient<false, true>(z, n, row_lse, row_rest, p_.col_lse[col], 0.0f, col_weight, g);
    const int64_t positive = col - p_.offset - first_row_;
    if (positive < first || positive >= first + n || positive >= rows_) return;
    g[positive - first] = p_.loss == Loss::kSigmoid
                              ? positive_of(p_, column) * row_weight_
                              : p_.positive_gradient[first_row_ + positive] * factor_;
  }

 private:
  const ContrastiveProblem& p_;
  const float* tile_;
  int64_t first_row_, first_col_, rows_, n_;
  float shift_, factor_, row_weight_, col_weight_;
  const float* row_factor_;
};

struct GradientScratch {
  float* gradient;    // [block_cols][tile_stride]
  float* words;       // [block_rows][gradient_stride], for a transposed gradient
  float* columns;     // two of block_rows
  float* row_factor;  // one of block_rows
};

// Words of one row of a transposed gradient of bfloat16 pairs; 16 more than needed, to spread over
// the cache sets.
inline int64_t gradient_stride(const ContrastiveProblem& p) { return p.block_cols / 2 + 16; }

#if defined(__AVX512BF16__)
// Gradients of columns j and j + 1 (0 past the end) as pairs.
inline void gradient_pairs(const TileGradient& gradient, int64_t j, int64_t cols, int64_t n,
                           float* columns, uint32_t* out) {
  gradient.column(j, columns);
  if (j + 1 < cols)
    gradient.column(j + 1, columns + n);
  else
    std::memset(columns + n, 0, n * 4);
  for (int64_t i = 0; i < n; i += kLanes)
    store_bf16_pairs(out + i, load(columns + i), load(columns + n + i));
}
#endif

#if defined(__AMX_BF16__)
// The logit gradient with the columns along contiguous words, 32 columns at a time.
inline void transposed_gradient(const TileGradient& gradient, int64_t cols, int64_t n,
                                int64_t stride, const GradientScratch& s, uint32_t* out,
                                int64_t out_stride) {
  uint32_t* pairs = reinterpret_cast<uint32_t*>(s.gradient);
  for (int64_t j = 0; j < cols; j += 2 * kTile) {
    for (int64_t k = 0; k < kTile; ++k)
      if (j + 2 * k < cols)
        gradient_pairs(gradient, j + 2 * k, cols, n, s.columns, pairs + k * stride);
      else
        std::memset(pairs + k * stride, 0, n * 4);
    transpose_words(pairs, stride, kTile, n, out + j / 2, out_stride);
  }
}
#endif

// accumulator += (logit gradient) * y for one tile.
template <class Gemm>
void add_row_gradient(const ContrastiveProblem& p, int64_t row_block, int64_t col_block,
                      const float* tile, const GradientScratch& s, const float* packed,
                      float* accumulator, int64_t width) {
  using Dot = typename Gemm::Dot;
  const int64_t rows = p.rows_in(row_block), n = round_up(rows, kPanel);
  const int64_t cols = p.cols_in(col_block), stride = fastvlp::tile_stride(p);
  const TileGradient gradient(p, row_block, col_block, tile, s.row_factor);
#if defined(__AMX_BF16__)
  if constexpr (Gemm::kTransposed) {
    uint32_t* words = reinterpret_cast<uint32_t*>(s.words);
    transposed_gradient(gradient, cols, n, stride, s, words, gradient_stride(p));
    return Gemm::multiply(words, gradient_stride(p), packed, accumulator, width, n, width / kPanel,
                          depth_words<Dot>(cols), 1.0f, true);
  }
#endif
  if constexpr (Dot::kPerWord == 1) {
    for (int64_t j = 0; j < cols; ++j) gradient.column(j, s.gradient + j * stride);
  } else {
#if defined(__AVX512BF16__)
    for (int64_t j = 0; j < cols; j += 2)
      gradient_pairs(gradient, j, cols, n, s.columns,
                     reinterpret_cast<uint32_t*>(s.gradient + j / 2 * stride));
#endif
  }
  multiply<Dot, Order::kRowContiguous>(reinterpret_cast<uint32_t*>(s.gradient), stride, packed,
                                       accumulator, width, round_up(rows, kRegisterRows),
                                       width / kPanel, depth_words<Dot>(cols), 1.0f, true);
}

// accumulator += (logit gradient)^T * x for one tile.
template <class Gemm>
void add_col_gradient(const ContrastiveProblem& p, int64_t row_block, int64_t col_block,
                      const float* tile, const GradientScratch& s, const float* packed,
                      float* accumulator, int64_t width) {
  using Dot = typename Gemm::Dot;
  const int64_t rows = p.rows_in(row_block), cols = p.cols_in(col_block);
  const int64_t stride = fastvlp::tile_stride(p), m = round_up(cols, Gemm::kRows);
  const TileGradient gradient(p, row_block, col_block, tile, s.row_factor);
  for (int64_t j = 0; j < cols; ++j) {
    float* out = s.gradient + j * stride;
    if constexpr (Dot::kPerWord == 1) {
      gradient.column(j, out);
    } else {
#if defined(__AVX512BF16__)
      gradient.column(j, s.columns);
      for (int64_t i = 0; i < round_up(rows, kPanel); i += 2 * kLanes)
        store_bf16(reinterpret_cast<uint32_t*>(out) + i / 2, load(s.columns + i),
                   load(s.columns + i + kLanes));
#endif
    }
  }
  for (int64_t j = cols; j < m; ++j)
    std::memset(s.gradient + j * stride, 0, depth_words<Dot>(rows) * 4);
  Gemm::multiply(reinterpret_cast<const uint32_t*>(s.gradient), stride, packed, accumulator, width,
                 m, width / kPanel, depth_words<Dot>(rows), 1.0f, true);
}

}  // namespace
