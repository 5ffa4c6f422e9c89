// What the operator (baseline code, owns memory and threads) and the per-instruction-set kernels of
// the word-patch alignment say to each other. A kernel call is one pair; it allocates nothing.
#pragma once

#include <cstdint>

#include "../core/matrix_view.h"

namespace fastvlp {

// The two sides are called x (words) and y (patches).
struct AlignmentProblem {
  int64_t x_rows;
  int64_t y_rows;
  int64_t dim;
  float beta;
  int64_t iterations;
  int64_t inner;
};

// One side of one pair. The results of the forward pass for each row: the factor that normalises
// it, 0 where it is padding, and `share`, the sum over the plan's row of plan times cosine (0 where
// the norm was too small to normalise by): what the derivative of the normalisation takes away.
struct AlignmentSide {
  Features features;
  const bool* padding;  // forward only
  float* factor;
  float* share;
};

struct AlignmentPair {
  AlignmentSide x;
  AlignmentSide y;
  float* plan;  // [x_rows, y_rows]
};

// Gradients [rows, dim] of one pair, contiguous, in the element type of the features.
struct AlignmentGradients {
  float upstream;
  void* dx;
  void* dy;
};

struct WordPatchAlignmentKernels {
  // Floats of scratch (64-byte aligned) that one call of either function needs.
  int64_t (*scratch_floats)(const AlignmentProblem&);
  // Writes plan, factors and shares; returns the distance.
  float (*align)(const AlignmentProblem&, const AlignmentPair&, float* scratch);
  void (*gradients)(const AlignmentProblem&, const AlignmentPair&, const AlignmentGradients&,
                    float* scratch);
};

}  // namespace fastvlp
