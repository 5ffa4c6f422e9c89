// Memory, threads and the order of blocks for the contrastive kernels. No torch types here.
#pragma once

#include <cstdint>

#include "../core/driver.h"
#include "kernel.h"

namespace fastvlp {

struct GradientPlan {
  // The tiles of the first kept_row_blocks rows of blocks, as statistics() left them; may be null.
  float* kept;
  int64_t kept_row_blocks;
  // The other blocks are computed again in groups of chunk_rows x chunk_cols blocks.
  int64_t chunk_rows;
  int64_t chunk_cols;
};

// Log-sum-exps over the negatives by row [x.rows] and by column [y.rows], -inf where there are
// none, and the positives' logits [x.rows] (0 where the positive lies outside the columns). `kept`
// receives the tiles of the first kept_row_blocks rows of blocks.
void contrastive_statistics(const ContrastiveProblem& p, const ContrastiveKernels& kernels,
                            const Parallel& parallel, int64_t threads, float* kept,
                            int64_t kept_row_blocks, double* row_negatives, double* col_negatives,
                            float* positive);

// dx = scale * G y and dy = scale * G^T x; returns the gradient w.r.t. the scale, <G, y x^T>. With
// `dx.data` null only the sigmoid sums are computed.
double contrastive_gradients(const ContrastiveProblem& p, const ContrastiveKernels& kernels,
                             const Parallel& parallel, const GradientPlan& plan, GradientOutput dx,
                             GradientOutput dy, SigmoidSums* sums);

}  // namespace fastvlp
