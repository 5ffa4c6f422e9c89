// Gradients w.r.t. a tile of logits.
#pragma once

#include <cmath>

#include "../../common/contrastive_math.h"
#include "../gemm/pack.h"
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

// Words of one row of a transposed gradient of bfloat16 pairs; 16 more than needed, to spread over
// the cache sets.
inline int64_t gradient_stride(const ContrastiveProblem& p) { return p.block_cols / 2 + 16; }

}  // namespace
