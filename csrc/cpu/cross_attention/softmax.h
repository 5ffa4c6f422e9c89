// The softmax stage over one block of attention weights between its matmuls. A block lies
// [keys][queries] in rows of m floats, so that a softmax over the keys runs along the lanes.
#pragma once

#include "../core/philox_simd.h"
#include "kernel.h"

namespace {

using fastvlp::AttentionProblem;
using fastvlp::AttentionTask;

constexpr float kNegativeInfinity = -__builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kSmallestNormal = 1.17549435e-38f;

// One block: query rows [first, first + queries) of a task, padded to m, against n attended keys.
struct WeightBlock {
  const AttentionProblem& p;
  const AttentionTask& task;
  int64_t first;  // of the task's query rows
  int64_t queries;
  int64_t m;
  int64_t first_key;  // of the attended ones
  int64_t n;
  float factor;  // of a dot product, to be a logit in units of ln 2; not negative

  int64_t key(int64_t r) const { return task.key(first_key + r); }
  // With a causal mask: the first of its rows that may attend to key r, aligned at the last key, so
  // that query i attends to key j where j <= i - queries + keys. May lie outside the block.
  int64_t first_row_of(int64_t r) const { return key(r) + task.queries - task.keys - first; }
};

// The dropout factors of the weights of one key and a vector of query rows, 0 or keep_scale.
class DropoutRow {
 public:
  void start(const WeightBlock& b, int64_t column) {
    const int64_t row = b.task.first_query + b.first + column;
    for (int i = 0; i < kLanes; ++i) rows_[i] = static_cast<uint32_t>(row + i);
    group_ = -1;
  }
  Vec factor(const WeightBlock& b, int64_t r) {
    const int64_t key = b.key(r);
    if (key / 4 != group_) {
      group_ = key / 4;
      philox(b.p.seed, static_cast<uint32_t>(group_), rows_, static_cast<uint32_t>(b.task.head),
             words_);
    }
    return words_[key % 4] >= splat_u(b.p.drop_below) ? splat(b.p.keep_scale) : Vec{};
  }

 private:
  VecU rows_ = {};
  VecU words_[4] = {};
  int64_t group_ = -1;
};

// Keys that a query row may not attend to get the dot product whose logit is -inf.
inline void mask_causal(const WeightBlock& b, float* s) {
  for (int64_t r = 0; r < b.n; ++r) {
    const int64_t see = b.first_row_of(r);
    for (int64_t i = 0; i < (see < b.m ? see : b.m); ++i) s[r * b.m + i] = kNegativeInfinity;
  }
}

// Dot products to exponentials relative to the largest logit, in place; dropped ones to 0.
// `largest` [m] in units of ln 2, `reciprocal` [m] of the sums before dropout, 0 where no key is
// attended.
template <int vectors, bool dropout>
void exponentials(const WeightBlock& b, int64_t column, float* s, float* largest,
                  float* reciprocal) {
  Vec most[vectors], sum[vectors] = {};
  for (int j = 0; j < vectors; ++j) most[j] = splat(kNegativeInfinity);
  float* at = s + column;
  for (int64_t r = 0; r < b.n; ++r)
    for (int j = 0; j < vectors; ++j) most[j] = max(load(at + r * b.m + j * kLanes), most[j]);
  for (int j = 0; j < vectors; ++j) {
    most[j] = most[j] * b.factor;
    most[j] = most[j] > splat(kNegativeInfinity) ? most[j] : Vec{};
  }
  DropoutRow drop[vectors];
  for (int j = 0; j < vectors; ++j) drop[j].start(b, column + j * kLanes);
  for (int64_t r = 0; r < b.n; ++r)
    for (int j = 0; j < vectors; ++j) {
      float* z = at + r * b.m + j * kLanes;
      Vec e = exp2(load(z) * b.factor - most[j]);
      sum[j] = sum[j] + e;
      if constexpr (dropout) e = e * drop[j].factor(b, r);
      store(z, e);
    }
  for (int j = 0; j < vectors; ++j) {
    store(largest + column + j * kLanes, most[j]);
    store(reciprocal + column + j * kLanes, sum[j] > Vec{} ? 1.0f / sum[j] : sum[j]);
  }
}

// Dot products s to the weights as they enter the output, and t, the gradient w.r.t. those, to that
// w.r.t. the dot products: scale * weight (t - delta), where delta [m] is the sum of weight times
// t.
template <int vectors, bool dropout>
void weight_gradients(const WeightBlock& b, int64_t column, const float* largest,
                      const float* reciprocal, const float* delta, float* s, float* t) {
  Vec most[vectors], scale[vectors], mean[vectors];
  for (int j = 0; j < vectors; ++j) {
    most[j] = load(largest + column + j * kLanes);
    scale[j] = load(reciprocal + column + j * kLanes);
    mean[j] = load(delta + column + j * kLanes);
  }
  DropoutRow drop[vectors];
  for (int j = 0; j < vectors; ++j) drop[j].start(b, column + j * kLanes);
  for (int64_t r = 0; r < b.n; ++r)
    for (int j = 0; j < vectors; ++j) {
      const int64_t at = r * b.m + column + j * kLanes;
      const Vec p = exp2(load(s + at) * b.factor - most[j]) * scale[j];
      Vec g = load(t + at), entering = p;
      if constexpr (dropout) {
        const Vec keep = drop[j].factor(b, r);
        g = g * keep;
        entering = p * keep;
      }
      store(s + at, entering);
      store(t + at, p * (g - mean[j]) * b.p.scale);
    }
}

// The largest dot product of each query row, 0 where it attends to no key.
inline void find_largest(const WeightBlock& b, float* s, float* largest) {
  if (b.p.causal) mask_causal(b, s);
  for (int64_t i = 0; i < b.m; i += kLanes) {
    Vec most = splat(kNegativeInfinity);
    for (int64_t r = 0; r < b.n; ++r) most = max(load(s + r * b.m + i), most);
    store(largest + i, most > splat(kNegativeInfinity) ? most : Vec{});
  }
}

// s - largest, each query row's.
inline void subtract(const WeightBlock& b, const float* largest, float* s) {
  for (int64_t r = 0; r < b.n; ++r)
    for (int64_t i = 0; i < b.m; i += kLanes)
      store(s + r * b.m + i, load(s + r * b.m + i) - load(largest + i));
}

template <class Function>
void by_columns(int64_t m, const Function& function) {
  int64_t column = 0;
  for (; column + 2 * kLanes <= m; column += 2 * kLanes)
    function(std::integral_constant<int, 2>{}, column);
  if (column < m) function(std::integral_constant<int, 1>{}, column);
}

inline void exponentials(const WeightBlock& b, float* s, float* largest, float* reciprocal) {
  if (b.p.causal) mask_causal(b, s);
  by_columns(b.m, [&](auto vectors, int64_t column) {
    if (b.p.drop_below)
      exponentials<vectors(), true>(b, column, s, largest, reciprocal);
    else
      exponentials<vectors(), false>(b, column, s, largest, reciprocal);
  });
}

inline void weight_gradients(const WeightBlock& b, const float* largest, const float* reciprocal,
                             const float* delta, float* s, float* t) {
  if (b.p.causal) mask_causal(b, s);
  by_columns(b.m, [&](auto vectors, int64_t column) {
    if (b.p.drop_below)
      weight_gradients<vectors(), true>(b, column, largest, reciprocal, delta, s, t);
    else
      weight_gradients<vectors(), false>(b, column, largest, reciprocal, delta, s, t);
  });
}

}  // namespace
