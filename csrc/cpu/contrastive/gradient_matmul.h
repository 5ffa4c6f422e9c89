// The matmuls of a tile's logit gradients with the features: one frame for every GEMM.
#pragma once

#include <algorithm>

#include "../gemm/policy.h"
#include "scratch.h"

namespace {

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
                                int64_t stride, float* gradients, float* columns, uint32_t* out,
                                int64_t out_stride) {
  uint32_t* pairs = reinterpret_cast<uint32_t*>(gradients);
  for (int64_t j = 0; j < cols; j += 2 * kTile) {
    for (int64_t k = 0; k < kTile; ++k)
      if (j + 2 * k < cols)
        gradient_pairs(gradient, j + 2 * k, cols, n, columns, pairs + k * stride);
      else
        std::memset(pairs + k * stride, 0, n * 4);
    transpose_words(pairs, stride, kTile, n, out + j / 2, out_stride);
  }
}
#endif

// Packs logit gradients as the left operand of a GEMM and multiplies them by packed features.
template <class Gemm>
class GradientMatmul {
  using Dot = typename Gemm::Dot;

 public:
  GradientMatmul(const ContrastiveProblem& p, float* base, const Scratch& s)
      : stride_(fastvlp::tile_stride(p)),
        width_(padded_dim(p)),
        words_stride_(gradient_stride(p)),
        most_(std::max(p.block_rows, p.block_cols)),
        gradient_(base + s.gradient),
        words_(base + s.words),
        columns_(base + s.columns) {}

  // Of the gradients: what they are multiplied by when packed.
  float factor() const { return 1.0f; }
  // How many rows, or columns, are packed at a time.
  int64_t group() const { return most_; }

  // out [count][width] += rows [first, first + count) of the gradient, along `cols` columns, times
  // the packed features of those. All rows of a tile are one group: first is 0.
  void add_rows(const TileGradient& gradient, int64_t, int64_t count, int64_t cols,
                const float* packed, float* out) const {
    const int64_t depth = depth_words<Dot>(cols), panels = width_ / kPanel;
    [[maybe_unused]] const int64_t n = round_up(count, kPanel);
#if defined(__AMX_BF16__)
    if constexpr (Gemm::kTransposed) {
      uint32_t* words = reinterpret_cast<uint32_t*>(words_);
      transposed_gradient(gradient, cols, n, stride_, gradient_, columns_, words, words_stride_);
      return Gemm::multiply(words, words_stride_, packed, out, width_, n, panels, depth, 1.0f,
                            true);
    }
#endif
    if constexpr (Dot::kPerWord == 1) {
      for (int64_t j = 0; j < cols; ++j) gradient.column(j, gradient_ + j * stride_);
    } else {
#if defined(__AVX512BF16__)
      for (int64_t j = 0; j < cols; j += 2)
        gradient_pairs(gradient, j, cols, n, columns_,
                       reinterpret_cast<uint32_t*>(gradient_ + j / 2 * stride_));
#endif
    }
    multiply<Dot, Order::kRowContiguous>(reinterpret_cast<uint32_t*>(gradient_), stride_, packed,
                                         out, width_, round_up(count, kRegisterRows), panels, depth,
                                         1.0f, true);
  }

  // The same of columns, along `rows` rows.
  void add_cols(const TileGradient& gradient, int64_t, int64_t count, int64_t rows,
                const float* packed, float* out) const {
    const int64_t depth = depth_words<Dot>(rows), m = round_up(count, Gemm::kRows);
    for (int64_t j = 0; j < count; ++j) {
      float* column = gradient_ + j * stride_;
      if constexpr (Dot::kPerWord == 1) {
        gradient.column(j, column);
      } else {
#if defined(__AVX512BF16__)
        gradient.column(j, columns_);
        for (int64_t i = 0; i < round_up(rows, kPanel); i += 2 * kLanes)
          store_bf16(reinterpret_cast<uint32_t*>(column) + i / 2, load(columns_ + i),
                     load(columns_ + i + kLanes));
#endif
      }
    }
    for (int64_t j = count; j < m; ++j) std::memset(gradient_ + j * stride_, 0, depth * 4);
    Gemm::multiply(reinterpret_cast<const uint32_t*>(gradient_), stride_, packed, out, width_, m,
                   width_ / kPanel, depth, 1.0f, true);
  }

 private:
  int64_t stride_, width_, words_stride_, most_;
  float* gradient_;  // [block_cols][tile_stride]
  float* words_;     // [block_rows][gradient_stride], for a transposed gradient
  float* columns_;   // two of block_rows
};

#if defined(__AMX_BF16__)
template <>
class GradientMatmul<Bf16x3Gemm> {
 public:
  GradientMatmul(const ContrastiveProblem& p, float* base, const Scratch& s)
      : width_(padded_dim(p)),
        factor_(weight_factor(p)),
        s_(split_scratch(base, s)),
        column_(base + s.columns) {}

  float factor() const { return factor_; }
  int64_t group() const { return kSplitGroup; }

  void add_rows(const TileGradient& gradient, int64_t first, int64_t count, int64_t cols,
                const float* packed, float* out) const {
    const int64_t n = round_up(count, kStepSide);
    split_gradient_rows(gradient, first, n, cols, s_);
    multiply_packed(steps_of(cols), n, packed, out);
  }

  void add_cols(const TileGradient& gradient, int64_t first, int64_t count, int64_t rows,
                const float* packed, float* out) const {
    const int64_t n = round_up(rows, kStepDepth);
    split_gradient_columns(gradient, first, count, n, column_, s_.a);
    multiply_packed(n / kStepDepth, round_up(count, kStepSide), packed, out);
  }

 private:
  void multiply_packed(int64_t steps, int64_t m, const float* packed, float* out) const {
    multiply_split(s_.a, reinterpret_cast<const uint32_t*>(packed + kPackedHeader), steps, out,
                   width_, m, width_ / kStepSide, quotient(1.0, factor_, packed[0]), true,
                   s_.block);
  }

  int64_t width_;
  float factor_;
  SplitScratch s_;
  float* column_;
};
#endif

// accumulator += (logit gradient) * y for one tile.
template <class Gemm>
void add_row_gradient(const ContrastiveProblem& p, int64_t row_block, int64_t col_block,
                      const float* tile, float* base, const Scratch& s, const float* packed,
                      float* accumulator) {
  const GradientMatmul<Gemm> matmul(p, base, s);
  const TileGradient gradient(p, row_block, col_block, tile, base + s.row_max, matmul.factor());
  const int64_t rows = p.rows_in(row_block), cols = p.cols_in(col_block), group = matmul.group();
  for (int64_t i = 0; i < rows; i += group)
    matmul.add_rows(gradient, i, std::min(group, rows - i), cols, packed,
                    accumulator + i * padded_dim(p));
}

// accumulator += (logit gradient)^T * x for one tile.
template <class Gemm>
void add_col_gradient(const ContrastiveProblem& p, int64_t row_block, int64_t col_block,
                      const float* tile, float* base, const Scratch& s, const float* packed,
                      float* accumulator) {
  const GradientMatmul<Gemm> matmul(p, base, s);
  const TileGradient gradient(p, row_block, col_block, tile, base + s.row_max, matmul.factor());
  const int64_t rows = p.rows_in(row_block), cols = p.cols_in(col_block), group = matmul.group();
  for (int64_t j = 0; j < cols; j += group)
    matmul.add_cols(gradient, j, std::min(group, cols - j), rows, packed,
                    accumulator + j * padded_dim(p));
}

}  // namespace
