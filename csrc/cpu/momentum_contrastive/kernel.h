// What the momentum-contrastive driver (baseline code, owns memory and threads) and its
// per-instruction-set kernels (no allocation, no threads, no torch) say to each other.
#pragma once

#include <cstdint>

#include "../core/matrix_view.h"

namespace fastvlp {

// One direction: logits of student and teacher rows against the keys of the other modality, those
// of the batch first, then the queue.
struct MomentumProblem {
  Features student;  // [batch, dim]
  Features teacher;
  Features batch_keys;
  Features queue;      // its valid rows
  const int64_t* ids;  // [batch]; null where only a row's own pair is positive
  const int64_t* queue_ids;
  int64_t batch, dim;
  float inverse_temperature;
  bool use_teacher;  // else alpha is 0 and the teacher rows are not read
  bool gradients;
  bool negatives;
  uint64_t seed;
  uint32_t stream;     // distinguishes the directions' random numbers
  int64_t group_rows;  // student rows processed together
  int64_t block_keys;  // keys processed together, a multiple of 32

  int64_t groups() const { return (batch + group_rows - 1) / group_rows; }
  int64_t rows_in(int64_t group) const {
    const int64_t left = batch - group * group_rows;
    return left < group_rows ? left : group_rows;
  }
  int64_t batch_blocks() const { return (batch + block_keys - 1) / block_keys; }
  int64_t blocks() const { return batch_blocks() + (queue.rows + block_keys - 1) / block_keys; }
  // Rows of one stacked tile: the group's student rows, then its teacher rows.
  int64_t stacked_rows() const { return group_rows * (use_teacher ? 2 : 1); }
};

// What one group of rows has accumulated over some of the keys. A row's own pair is left out of the
// sums and waits as a logit: of a saturated softmax the small difference to its target must
// survive. Stacked rows [2 * group_rows] hold students, then teachers; teachers only where used.
struct MomentumPartial {
  float* reference;      // [stacked] what was subtracted from the logits
  float* sum;            // [stacked] of exp(logit - reference)
  float* cross;          // [group_rows] sum of exp(teacher logit - reference) * student logit
  float* keys;           // [stacked][padded dim] sum of exp(logit - reference) * key
  float* own;            // [stacked] logit of the row's own pair; NaN until found
  float* positive;       // [group_rows] sum of the logits of its other positives
  float* positives;      // [group_rows] their number
  float* positive_keys;  // [group_rows][padded dim] their sum
  float* best;           // [group_rows] highest perturbed logit among the admissible negatives
  int64_t* negative;     // [group_rows] its column in the batch, -1 where there is none
};

struct MomentumKernels {
  // How many rows to process together, at most as many as the problem has now, a multiple of 32.
  int64_t (*group_rows)(const MomentumProblem&);
  int64_t (*scratch_bytes)(const MomentumProblem&);  // 64-byte aligned
  int64_t (*padded_dim)(const MomentumProblem&);
  // Adds key blocks [begin, end) to an initialised partial result of one group of rows.
  void (*accumulate)(const MomentumProblem&, int64_t group, int64_t begin, int64_t end,
                     void* scratch, const MomentumPartial&);
};

}  // namespace fastvlp
