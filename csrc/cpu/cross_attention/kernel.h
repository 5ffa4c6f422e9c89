// What the attention driver (baseline code, owns memory and threads) and the per-instruction-set
// kernels (no allocation, no threads, no torch) say to each other.
#pragma once

#include <cstdint>

#include "../core/matrix_view.h"

namespace fastvlp {

// One tensor of rows and heads, with unit stride along the head's width. All in elements.
struct AttentionStrides {
  int64_t segment;  // from one segment of keys, or packed row, to the next
  int64_t row;
  int64_t head;
};

struct AttentionInput : AttentionStrides {
  const void* data;
};

struct AttentionOutput : AttentionStrides {
  void* data;
};

struct AttentionProblem {
  AttentionInput q, k, v, grad;  // grad, of the output, for the backward pass only
  Element element;               // of all four
  int64_t heads;
  int64_t dim;
  int64_t total_queries;
  float scale;
  bool causal;
  bool streams;         // outputs are too large for the caches: they are written past them
  uint32_t drop_below;  // weights whose random word is below are dropped; 0: no dropout
  float keep_scale;     // factor of the weights that stay
  uint64_t seed;
};

// One head of one segment: every query row against every attended key row.
struct AttentionTask {
  int64_t head;
  int64_t first_query;
  int64_t queries;
  int64_t segment;          // of the keys, or the first of its rows where keys are packed
  int64_t keys;             // rows of the segment
  const int32_t* attended;  // the attended rows, ascending; null: all
  int64_t attended_keys;
  const AttentionTask* next;  // what this thread does after it, null if unknown
  // A thread takes `run` heads of a segment one after another, of which this is number `place`.
  int64_t run, place;
  const AttentionTask* next_run;  // the first one of those it takes after them, null if unknown

  // The row of the segment that is the r-th attended one.
  int64_t key(int64_t r) const { return attended ? attended[r] : r; }
};

// Outputs are of the inputs' element type. Of the softmax two numbers per head and query row are
// kept, [2][heads][total_queries]: the largest logit, or one little below, in units of ln 2 and the
// reciprocal of the sum of exponentials relative to it, 0 for a row that attends to no key; of
// tasks with logits above 2^29 the largest dot product and minus the reciprocal. The backward pass
// finds from them the very weights of the forward pass.
struct AttentionForward {
  AttentionOutput out;
  float* statistics;
};

struct AttentionBackward {
  AttentionInput out;
  const float* statistics;
  AttentionOutput dq, dk, dv;
};

struct AttentionKernels {
  // Floats of 64-byte aligned scratch for a task of at most so many rows.
  int64_t (*forward_scratch)(const AttentionProblem&, int64_t queries, int64_t attended_keys);
  int64_t (*backward_scratch)(const AttentionProblem&, int64_t queries, int64_t attended_keys);
  void (*forward)(const AttentionProblem&, const AttentionTask&, const AttentionForward&,
                  float* scratch);
  void (*backward)(const AttentionProblem&, const AttentionTask&, const AttentionBackward&,
                   float* scratch);
};

}  // namespace fastvlp
