// Keys beyond the last whole block of 32 in the passes on AMX tiles, where they are few, on the
// SIMD code: on the tiles a block for one key takes as long as one for 32, and images have one
// token more than patches.
#pragma once

#include "tiles.h"

#if defined(__AMX_BF16__)

namespace {

constexpr int64_t kMaxRemainderKeys = 8;
constexpr int64_t kMaxRemainderWidth = 128;

// How many of a task's attended keys the tiles do, the first ones.
inline int64_t tiled_keys(const AttentionProblem& p, const AttentionTask& task) {
  const int64_t remainder = task.attended_keys % kStepSide;
  const bool few = remainder <= kMaxRemainderKeys && remainder < task.attended_keys &&
                   p.dim <= kMaxRemainderWidth;
  return few ? task.attended_keys - remainder : task.attended_keys;
}

template <class Rows, int kDim>
class RemainderKeys {
  using Scalar = typename Rows::Scalar;
  static constexpr int kVectors = (kDim > 0 ? kDim : kMaxRemainderWidth) / kLanes;

 public:
  // The operands of a block of query rows in the backward pass, as the tiles use them.
  struct QueryBlock {
    const float *largest, *reciprocal, *delta;
    float* sums;
  };

  // `first`: what tiled_keys gives.
  RemainderKeys(const AttentionProblem& p, const AttentionTask& task, int64_t first)
      : p_(p),
        task_(task),
        first_(first),
        keys_(attended_rows(p, task, p.k)),
        values_(attended_rows(p, task, p.v)) {
    for (int64_t key = first_; key < task.attended_keys; ++key) {
      prefetch_row<2>(keys_, key, p.dim);
      prefetch_row<2>(values_, key, p.dim);
    }
  }

  // Logits [remainder keys][m] of those that any row of the block may attend to, and the largest
  // with them.
  void add_logits(const WeightBlock& b, float* logits, float* largest) const {
    const WeightBlock remainder = remainder_of(b);
    const float sign = p_.scale < 0 ? -1.0f : 1.0f;
    for (int64_t i = 0; i < remainder.n; ++i)
      for (int64_t r = 0; r < b.m; ++r)
        logits[i * b.m + r] =
            r < b.queries ? sign * dot(row_of(keys_, first_ + i), query(p_.q, b.first + r)) : 0.0f;
    if (p_.causal) mask_causal(remainder, logits);
    for (int64_t i = 0; i < remainder.n; ++i)
      for (int64_t r = 0; r < b.m; r += kLanes)
        store(largest + r, max(load(logits + i * b.m + r), load(largest + r)));
  }

  // What they add to the sums of weights, `total`, and to those of values: [m][width] if
  // `row_major`.
  void add_values(const WeightBlock& b, float* logits, const float* largest, float* total,
                  float* sums, bool row_major) const {
    const WeightBlock remainder = remainder_of(b);
    for (int64_t i = 0; i < remainder.n; ++i) {
      float* weights = logits + i * b.m;
      for (int64_t r = 0; r < b.m; r += kLanes) {
        Vec w = exp2(load(weights + r) * b.factor - load(largest + r));
        store(total + r, load(total + r) + w);
        if (p_.drop_below != 0) w = w * kept(remainder, r, i);
        store(weights + r, w);
      }
      Row value;
      read(row_of(values_, first_ + i), value);
      for (int64_t r = 0; r < b.m; r += kLanes)
        add_outer(b, weights + r, r, value, sums, row_major);
    }
  }

  // Adds to the gradients of queries, and stores those of the remainder keys. block(first) gives
  // the operands of the query rows that begin there.
  template <class Block>
  void run_backward(const TileShape<Rows>& x, const AttentionBackward& out, bool row_major,
                    const Block& block) const {
    for (int64_t i = 0; i < task_.attended_keys - first_; ++i) {
      Row key, value, dk = {}, dv = {};
      read(row_of(keys_, first_ + i), key);
      read(row_of(values_, first_ + i), value);
      for (int64_t first = 0; first < task_.queries; first += x.kQueryBlock) {
        const WeightBlock b = block_at(x, p_, task_, first);
        if (i >= remainder_of(b).n) continue;
        const QueryBlock q = block(first);
        for (int64_t r = 0; r < b.queries; r += kLanes)
          add_gradients(b, q, i, r, key, value, dk, dv, row_major);
      }
      store_gradient(dk, out.dk, i);
      store_gradient(dv, out.dv, i);
    }
  }

 private:
  using Row = Vec[kVectors];

  // Of the remainder keys those that any row of the block may attend to.
  WeightBlock remainder_of(const WeightBlock& b) const {
    WeightBlock remainder = b;
    remainder.first_key = first_;
    remainder.n = b.n > first_ ? b.n - first_ : 0;
    return remainder;
  }

  static const Scalar* row_of(const AttendedRows& rows, int64_t r) {
    return static_cast<const Scalar*>(rows.features.data) + rows[r] * rows.features.stride;
  }
  const Scalar* query(const AttentionInput& input, int64_t r) const {
    return static_cast<const Scalar*>(query_rows(p_, task_, input).data) + r * input.row;
  }

  [[gnu::always_inline]] Vec piece(const Scalar* row, int i) const {
    if constexpr (kDim > 0) return Rows::load_some(row + i * kLanes, kLanes);
    const int64_t left = p_.dim - i * kLanes;
    return left > 0 ? Rows::load_some(row + i * kLanes, left) : Vec{};
  }
  [[gnu::always_inline]] void read(const Scalar* row, Row& out) const {
    FASTVLP_UNROLL
    for (int i = 0; i < kVectors; ++i) out[i] = piece(row, i);
  }
  [[gnu::always_inline]] float dot(const Scalar* a, const Scalar* b) const {
    Row x;
    read(a, x);
    return dot(x, b);
  }
  [[gnu::always_inline]] float dot(const Row& a, const Scalar* b) const {
    Vec sum = {};
    FASTVLP_UNROLL
    for (int i = 0; i < kVectors; ++i) sum = sum + a[i] * piece(b, i);
    return horizontal_sum(sum);
  }
  [[gnu::always_inline]] void add_row(float factor, const Scalar* in, Row& out) const {
    FASTVLP_UNROLL
    for (int i = 0; i < kVectors; ++i) out[i] = out[i] + splat(factor) * piece(in, i);
  }

  static Vec kept(const WeightBlock& remainder, int64_t column, int64_t i) {
    DropoutRow drop;
    drop.start(remainder, column);
    return drop.factor(remainder, i);
  }

  // Sixteen weights, of query rows from r on, times a row.
  void add_outer(const WeightBlock& b, const float* weights, int64_t r, const Row& row, float* sums,
                 bool row_major) const {
    const int64_t width = round_up(p_.dim, kStepSide);
    if (row_major) {
      for (int64_t j = r; j < r + kLanes; ++j)
        for (int64_t d = 0; d * kLanes < p_.dim; ++d) {
          float* at = sums + j * width + d * kLanes;
          store(at, load(at) + splat(weights[j - r]) * row[d]);
        }
      return;
    }
    alignas(64) float numbers[kMaxRemainderWidth];
    for (int i = 0; i < kVectors; ++i) store(numbers + i * kLanes, row[i]);
    for (int64_t d = 0; d < p_.dim; ++d) {
      float* at = sums + d * b.m + r;
      store(at, load(at) + splat(numbers[d]) * load(weights));
    }
  }

  void add_gradients(const WeightBlock& b, const QueryBlock& q, int64_t i, int64_t r,
                     const Row& key, const Row& value, Row& dk, Row& dv, bool row_major) const {
    const int64_t count = b.queries - r < kLanes ? b.queries - r : kLanes;
    const WeightBlock remainder = remainder_of(b);
    const float sign = p_.scale < 0 ? -1.0f : 1.0f;
    const int64_t see = p_.causal ? remainder.first_row_of(i) : 0;
    alignas(64) float logits[kLanes] = {}, derivatives[kLanes] = {}, weights[kLanes];
    for (int64_t j = 0; j < count; ++j) {
      const float s = sign * dot(key, query(p_.q, b.first + r + j));
      logits[j] = r + j < see ? kNegativeInfinity : s;
      derivatives[j] = dot(value, query(p_.grad, b.first + r + j));
    }
    Vec w = exp2(load(logits) * b.factor - load(q.largest + r)) * load(q.reciprocal + r);
    Vec t = load(derivatives), entering = w;
    if (p_.drop_below != 0) {
      const Vec keep = kept(remainder, r, i);
      t = t * keep;
      entering = w * keep;
    }
    store(weights, entering);
    store(derivatives, w * (t - load(q.delta + r)) * p_.scale);
    for (int64_t j = 0; j < count; ++j) {
      add_row(weights[j], query(p_.grad, b.first + r + j), dv);
      add_row(derivatives[j], query(p_.q, b.first + r + j), dk);
    }
    add_outer(b, derivatives, r, key, q.sums, row_major);
  }

  void store_gradient(const Row& row, const AttentionOutput& out, int64_t i) const {
    alignas(64) float numbers[kMaxRemainderWidth];
    for (int j = 0; j < kVectors; ++j) store(numbers + j * kLanes, row[j]);
    store_row_as<Rows, kDim>(p_, numbers, key_outputs(p_, task_, out)[task_.key(first_ + i)]);
  }

  const AttentionProblem& p_;
  const AttentionTask& task_;
  const int64_t first_;
  const AttendedRows keys_, values_;
};

}  // namespace

#endif
