// Per-element maths of the momentum update and of the AdamW step, shared by the CPU build and the
// CUDA build so that the arithmetic a GPU runs is the arithmetic the CPU tests check.
#pragma once

#include <cmath>

#include "host_device.h"

namespace fastvlp {

// momentum <- decay * momentum + (1 - decay) * source, as a step from the nearer end: a value that
// equals its source stays what it is, and a decay of 0 or 1 gives one of the two to the bit.
struct EmaWeights {
  float weight;      // of the farther end, at most 1/2
  bool from_source;  // the source is the nearer end
};

FASTVLP_HD EmaWeights ema_weights(double decay) {
  if (decay >= 0.5) return {static_cast<float>(1.0 - decay), false};
  return {static_cast<float>(decay), true};
}

FASTVLP_HD bool is_decay(double decay) { return decay >= 0.0 && decay <= 1.0; }

FASTVLP_HD float ema(float momentum, float source, EmaWeights w) {
  const float base = w.from_source ? source : momentum;
  const float other = w.from_source ? momentum : source;
  // Infinite values (masks) stay what they are, where the difference would be NaN.
  if (w.weight == 0.0f || other == base) return base;
  return base + w.weight * (other - base);
}

// What one AdamW step has in common for all elements of a tensor.
struct AdamWFactors {
  float gradient;      // -1 to maximise
  float shrink;        // 1 - lr * weight_decay
  float first_weight;  // 1 - beta1
  float beta2;
  float second_weight;  // 1 - beta2
  float step_size;      // lr / (1 - beta1^t)
  float root_factor;    // 1 / sqrt(1 - beta2^t)
  float eps;
};

FASTVLP_HD AdamWFactors adamw_factors(double lr, double beta1, double beta2, double eps,
                                      double weight_decay, double step, bool maximize) {
  return {maximize ? -1.0f : 1.0f,
          static_cast<float>(1.0 - lr * weight_decay),
          static_cast<float>(1.0 - beta1),
          static_cast<float>(beta2),
          static_cast<float>(1.0 - beta2),
          static_cast<float>(lr / (1.0 - pow(beta1, step))),
          static_cast<float>(1.0 / sqrt(1.0 - pow(beta2, step))),
          static_cast<float>(eps)};
}

// Weight, first and second moment of one element, updated in place.
FASTVLP_HD void adamw(float gradient, float& weight, float& first, float& second,
                      const AdamWFactors& f) {
  const float g = f.gradient * gradient;
  first = first + f.first_weight * (g - first);
  second = f.beta2 * second + f.second_weight * (g * g);
  const float denominator = sqrtf(second) * f.root_factor + f.eps;
  weight = f.shrink * weight - f.step_size * (first / denominator);
}

// True for NaN too.
FASTVLP_HD bool exceeds(float value, float limit) { return !(fabsf(value) <= limit); }

}  // namespace fastvlp
