// Losses of pairs and what their gradients start from, as fastvlp/ops/contrastive/pairs.py has them
// for other devices: with L the log-sum-exp over the negatives of a row or column and z the logit
// of its positive p, neither -log p nor 1 - p is a difference of two numbers near each other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../core/driver.h"

namespace fastvlp {

// What a loss of `n` pairs knows of them: the log-sum-exps over the negatives of rows and of
// columns (null: a direction without a loss), and the positives' logits.
struct PairStatistics {
  const double* row_negatives;
  const double* col_negatives;
  const double* positive;
  int64_t n;
  int64_t directions() const { return (row_negatives != nullptr) + (col_negatives != nullptr); }
};

// log(exp(a) + exp(b)); where a and b are equal, infinities included, their difference is 0.
inline double log_add_exp(double a, double b) {
  const double difference = a == b ? 0.0 : -std::fabs(a - b);
  return (a > b ? a : b) + std::log1p(std::exp(difference));
}

// -log p = log(1 + exp(L - z)). An infinite z is no loss of 0: NaN.
inline double pair_loss(double negatives, double positive) {
  const double d = negatives - positive;
  return std::max(d, 0.0) + std::log1p(std::exp(-std::fabs(d))) + 0.0 * positive;
}

// 1 - p = 1 / (1 + exp(z - L)).
inline double missing_probability(double negatives, double positive) {
  return 1.0 / (1.0 + std::exp(positive - negatives));
}

// Calls body(begin, end) for parts of [0, n) whose sizes do not depend on the number of threads.
template <class Body>
void for_pairs(const Parallel& parallel, int64_t n, const Body& body) {
  constexpr int64_t kPairs = 1024;
  parallel((n + kPairs - 1) / kPairs, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      body(part * kPairs, std::min(n, (part + 1) * kPairs));
  });
}

// The mean over the pairs, and over the directions. Parts are added in order, whoever made them.
inline double mean_loss(const Parallel& parallel, const PairStatistics& pairs) {
  std::vector<double> losses(pairs.n, 0.0);
  for_pairs(parallel, pairs.n, [&](int64_t begin, int64_t end) {
    for (const double* negatives : {pairs.row_negatives, pairs.col_negatives})
      for (int64_t i = begin; negatives != nullptr && i < end; ++i)
        losses[i] += pair_loss(negatives[i], pairs.positive[i]);
  });
  return std::accumulate(losses.begin(), losses.end(), 0.0) /
         static_cast<double>(pairs.n * pairs.directions());
}

}  // namespace fastvlp
