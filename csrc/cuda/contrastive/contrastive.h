// The CUDA passes of the contrastive losses over a chunk of similarities, as the host code sees
// them: no torch here and no CUDA types, so that nvcc compiles no torch header and the host
// compiler no CUDA one.
#pragma once

#include <cstdint>

#include "../../common/contrastive_math.h"
#include "../../common/element.h"
#include "../core/queue.h"

namespace fastvlp::cuda {

// Similarities <x_i, y_j> [rows, cols], unit stride along the columns. The logit is scale *
// similarity (+ bias); the positive of row i is column i + offset.
struct Similarities {
  const float* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;  // elements from one row to the next
  int64_t offset;
  bool vectorized;  // rows start at multiples of 16 bytes
};

// The logit gradients, shaped like the similarities.
struct Output {
  void* data;  // null: not wanted
  int64_t stride;
  Element element;
  bool vectorized;  // rows start at multiples of four elements
};

// Row statistics [rows]; row_negatives, the log-sum-exp over the negatives, may be null. Column
// statistics [cols]: the running pair over the negatives, merged into; both null or neither.
struct Statistics {
  double* row_negatives;
  float* positive;
  float* col_max;
  float* col_sum;
};

// Elements of scratch memory that the functions below need.
int64_t row_pair_count(const Similarities& p);
int64_t col_pair_count(const Similarities& p);
int64_t sigmoid_partial_count(const Similarities& p);

// Each queues its kernels and returns null, or CUDA's error message. Scalars are read
// on the device. Every sum is taken in a fixed order: the same input gives the same bits.
const char* statistics(Queue queue, const Similarities& p, const float* scale, LsePair* row_pairs,
                       LsePair* col_pairs, const Statistics& out);
const char* softmax_gradient(Queue queue, const Similarities& p, const float* scale,
                             const double* row_lse, const double* col_lse,
                             const float* positive_gradient, const float* weights,
                             const Output& out);
const char* sigmoid(Queue queue, const Similarities& p, const float* scale, const float* bias,
                    float factor, double* partials, double* sums, const Output& out);

// Null where there is a device of this index, else why there is none.
const char* device_error(int device);
// Null where the compiled kernels run on `device`, which is there, else why they do not. For the
// driver it is the current device afterwards, as after a launch.
const char* kernel_error(int device);

}  // namespace fastvlp::cuda
