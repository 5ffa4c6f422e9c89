// Which GEMM a contrastive problem takes, and the scratch memory of one call of its kernels.
#pragma once

#include "../core/scratch_layout.h"
#include "../gemm/pack.h"
#include "gradient.h"
#include "split.h"

namespace {

// Of x and of y, which have one type.
inline bool is_bfloat16(const ContrastiveProblem& p) { return p.x.element == Element::kBFloat16; }

#if defined(__AMX_BF16__)
inline bool uses_bf16x3_gemm(const ContrastiveProblem& p) { return !is_bfloat16(p); }
#else
inline bool uses_bf16x3_gemm(const ContrastiveProblem&) { return false; }
#endif

inline int64_t padded_dim(const ContrastiveProblem& p) { return round_up(p.dim, kPanel); }

// Rows of the packed A operand are 16 words longer than needed, to spread over the cache sets.
inline int64_t row_words(const ContrastiveProblem& p) { return round_up(p.dim, 16) + 16; }

// The scratch buffers of one call, in words; sized for the widest use.
struct Scratch : ScratchLayout {
  explicit Scratch(const ContrastiveProblem& p) {
    if (uses_bf16x3_gemm(p)) {
#if defined(__AMX_BF16__)
      x_panels = take(split_words(p.block_rows, p.dim));
      x_factor = take(1);
      a = take(split_group_words(p));
      gradient = take(kStepDepth * SplitScratch::kColumnStride);
      transposed = take(kTile * kStepDepth);
      block = take(kStepSide * kStepSide);
#endif
    } else {
      x_panels = take(p.block_rows * round_up(p.dim, 16));
      y_rows = take(p.block_cols * row_words(p));
      gradient = take(p.block_cols * fastvlp::tile_stride(p));
      words = take(p.block_rows * gradient_stride(p));
      row = take(2 * padded_dim(p));
    }
    columns = take(2 * p.block_rows);
    row_max = take(p.block_rows);
    row_sum = take(p.block_rows);
    tile_max = take(p.block_rows);
    col_max = take(p.block_cols);
    tile = take(fastvlp::tile_floats(p));
  }
  int64_t x_panels = 0, gradient = 0, columns, row_max, row_sum, tile_max, col_max, tile;
  int64_t y_rows = 0, words = 0, row = 0;                  // where operands are not split
  int64_t x_factor = 0, a = 0, transposed = 0, block = 0;  // where they are
};

#if defined(__AMX_BF16__)
inline SplitScratch split_scratch(float* base, const Scratch& s) {
  return {reinterpret_cast<uint32_t*>(base + s.a), base + s.gradient, base + s.transposed,
          base + s.block};
}
#endif

}  // namespace
