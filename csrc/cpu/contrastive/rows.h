// Elementwise passes over one column of a logits tile (contiguous along the block's rows): softmax
// statistics, logit gradients, and the sums of the sigmoid loss.
#pragma once

#include "../core/simd.h"
#include "kernel.h"

namespace {

using fastvlp::ContrastiveProblem;
using fastvlp::SigmoidSums;

constexpr float kNegativeInfinity = -__builtin_inff();
// The maximum of nothing. Finite, so that a logit of -inf lies infinitely far below it.
constexpr float kLowest = -__FLT_MAX__;

// Raises the running row maxima to include this column and returns the column's own maximum.
inline float update_maxima(const float* z, int64_t n, float* row_max) {
  Vec column = splat(kLowest);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = load(z + i);
    column = max(v, column);
    store(row_max + i, max(v, load(row_max + i)));
  }
  return horizontal_max(column);
}

// Adds exp(z - row_max) to the row sums and returns the sum of exp(z - column_max).
template <bool rows, bool cols>
float add_exponentials(const float* z, int64_t n, const float* row_max, float* row_sum,
                       float column_max) {
  Vec column = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = load(z + i);
    if constexpr (rows) store(row_sum + i, load(row_sum + i) + exp(v - load(row_max + i)));
    if constexpr (cols) column = column + exp(v - column_max);
  }
  return cols ? horizontal_sum(column) : 0.0f;
}

// The same with one exponential for both directions: e = exp(z - shift), added to the row sums,
// summed over the column, and left in place of z where `keep`.
template <bool keep>
float add_shifted_exponentials(float* z, int64_t n, float shift, float* row_sum) {
  Vec column = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec e = exp(load(z + i) - shift);
    if constexpr (keep) store(z + i, e);
    store(row_sum + i, load(row_sum + i) + e);
    column = column + e;
  }
  return horizontal_sum(column);
}

template <bool rows, bool cols>
void softmax_gradient(const float* z, int64_t n, const float* row_lse, const float* row_rest,
                      float col_lse, float row_weight, float col_weight, float* g) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = load(z + i);
    Vec sum = {};
    if constexpr (rows) sum = sum + exp((v - load(row_lse + i)) - load(row_rest + i)) * row_weight;
    if constexpr (cols) sum = sum + exp(v - col_lse) * col_weight;
    store(g + i, sum);
  }
}

// The same from e = exp(z - shift): both softmaxes are e times a factor of the row or column.
inline void shifted_softmax_gradient(const float* e, int64_t n, const float* row_factor,
                                     float col_factor, float* g) {
  for (int64_t i = 0; i < n; i += kLanes)
    store(g + i, load(e + i) * (load(row_factor + i) + col_factor));
}

inline void sigmoid_gradient(const float* z, int64_t n, float bias, float weight, float* g) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = load(z + i) + bias;
    const Vec u = exp(-absolute(v));
    const Vec numerator = v < 0.0f ? u : splat(1.0f);
    store(g + i, numerator / (u + 1.0f) * weight);
  }
}

// Sums of softplus(z + bias) and sigmoid(z + bias).
inline void add_sigmoid_sums(const float* z, int64_t n, float bias, SigmoidSums* sums) {
  Vec loss = {}, gradient = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = load(z + i) + bias;
    const Vec u = exp(-absolute(v));
    const Vec positive = v < 0.0f ? splat(0.0f) : v;
    const Vec numerator = v < 0.0f ? u : splat(1.0f);
    loss = loss + (positive + log1p_unit(u));
    gradient = gradient + numerator / (u + 1.0f);
  }
  sums->loss += horizontal_sum(loss);
  sums->gradient += horizontal_sum(gradient);
}

}  // namespace
