// Per-element maths of the contrastive losses, shared by the CPU build and the CUDA build so that
// the arithmetic a GPU runs is the arithmetic the CPU tests check.
#pragma once

#include <cmath>

#include "host_device.h"

namespace fastvlp {

// A partial log-sum-exp: sum of exp(z - max) over the elements so far. The empty pair is
// {-inf, 0}.
struct LsePair {
  float max;
  float sum;
};

// Merges two partial log-sum-exps. Associative up to rounding, so callers fix the order.
FASTVLP_HD LsePair merge(LsePair a, LsePair b) {
  if (a.sum == 0.0f) return b;
  if (b.sum == 0.0f) return a;
  const float max = a.max > b.max ? a.max : b.max;
  return {max, a.sum * expf(a.max - max) + b.sum * expf(b.max - max)};
}

// What to subtract from logits whose largest is `max`: that one, except where nothing but -inf was
// seen, because exp(-inf - -inf) is NaN and exp(-inf - 0) the 0 that is meant.
FASTVLP_HD float exponent_reference(float max) { return max == -INFINITY ? 0.0f : max; }

// In double: next to a large maximum the logarithm would lose what the sum is exact to.
FASTVLP_HD double log_sum_exp(LsePair p) {
  return static_cast<double>(p.max) + log(static_cast<double>(p.sum));
}

// Gradient of the weighted softmax losses w.r.t. a negative's logit z: the share of the row softmax
// plus the share of the column softmax. That of a positive would be a difference from 1: the caller
// has it from the negatives' log-sum-exp.
FASTVLP_HD float softmax_logit_gradient(float z, float row_lse, float col_lse, float row_weight,
                                        float col_weight) {
  float g = 0.0f;
  if (row_weight != 0.0f) g += row_weight * expf(z - row_lse);
  if (col_weight != 0.0f) g += col_weight * expf(z - col_lse);
  return g;
}

// log(1 + exp(z)) without overflow, relatively exact for z far below zero.
FASTVLP_HD float softplus(float z) { return (z > 0.0f ? z : 0.0f) + log1pf(expf(-fabsf(z))); }

FASTVLP_HD float sigmoid(float z) {
  const float u = expf(-fabsf(z));
  return (z >= 0.0f ? 1.0f : u) / (1.0f + u);
}

// -log sigmoid(t z) with t = 1 for a positive pair and -1 for a negative one.
FASTVLP_HD float sigmoid_loss(float z, bool positive) { return softplus(positive ? -z : z); }

// Its derivative with respect to z. That of a positive pair keeps the small differences of
// sigmoid(z) from 1, which sigmoid(z) - 1 would lose to cancellation.
FASTVLP_HD float sigmoid_logit_gradient(float z, bool positive) {
  return positive ? -sigmoid(-z) : sigmoid(z);
}

}  // namespace fastvlp
