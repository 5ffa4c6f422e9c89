// Memory, threads and the final sums of the momentum-contrastive kernels. No torch types here.
#pragma once

#include "../core/driver.h"
#include "kernel.h"

namespace fastvlp {

// Results of one direction; the loss is the mean over its rows.
struct MomentumOutput {
  double loss;
  double temperature_gradient;
  GradientOutput student;  // [batch, dim]; data null where no gradients are wanted
  int64_t* negatives;      // [batch]; null where none are wanted
};

// Both directions at once: problems[0] and outputs[0] are one, [1] the other. They agree in batch,
// dim, group_rows, block_keys and options. Gradients are those of `share` times each loss.
void momentum_contrastive(const MomentumProblem (&problems)[2], const MomentumKernels& kernels,
                          const Parallel& parallel, int64_t threads, double alpha, double share,
                          MomentumOutput (&outputs)[2]);

}  // namespace fastvlp
