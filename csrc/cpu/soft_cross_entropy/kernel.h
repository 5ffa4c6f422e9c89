// What the soft cross entropy operators (argument checks, threads) and the per-instruction-set
// passes over rows of logits say to each other.
#pragma once

#include <cstdint>

#include "../core/matrix_view.h"

namespace fastvlp {

// Logits [rows, cols] of a vocabulary, with unit stride along it and without their bias.
struct Logits {
  const void* data;  // null: there are none
  Element element;   // kFloat32 or kBFloat16
  int64_t stride;
  const float* bias;  // [cols], or null
};

struct SoftCrossEntropyRows {
  Logits student;
  Logits teacher;
  int64_t cols;
  const int64_t* labels;
  int64_t ignore_index;
  float alpha;  // weight of the teacher
  float* losses;
  // The gradient of each row's loss w.r.t. its logits, in the student's element; may lie over the
  // student's logits; null where not wanted.
  void* gradient;
  int64_t gradient_stride;
};

// The most rows that `weight_gradient` takes: of more, a matmul on packed operands is faster.
constexpr int64_t kFewRows = 32;
// Rows of hidden states are rounded up to a multiple of so many floats.
constexpr int64_t kHiddenGrain = 64;

// out[v] = factor * sum_i gradient[i, v] * hidden[i], a matmul that does little else than write.
struct WeightGradient {
  Logits gradient;  // [rows, vocabulary]
  int64_t rows;     // up to kFewRows
  // [rows][stride], the stride being the width rounded up, with zeros past the width.
  const float* hidden;
  int64_t width;
  int64_t stride;
  float factor;
  void* out;  // [vocabulary, width], contiguous
  Element element;
  bool is_large;  // more than caches hold
};

struct SoftCrossEntropyKernels {
  // Floats of scratch (64-byte aligned) that one call of `rows` needs.
  int64_t (*scratch_floats)(const SoftCrossEntropyRows&);
  // Losses and gradients of rows [begin, end).
  void (*rows)(const SoftCrossEntropyRows&, int64_t begin, int64_t end, float* scratch);
  // sums[j] = sum_i weights[i] * matrix[i, j] over all rows for columns [begin, end).
  void (*column_sums)(const Logits& matrix, int64_t rows, const float* weights, int64_t begin,
                      int64_t end, float* sums);
  // Rows [begin, end) of the vocabulary. Scratch: 2 * stride floats.
  void (*weight_gradient)(const WeightGradient&, int64_t begin, int64_t end, float* scratch);
};

}  // namespace fastvlp
