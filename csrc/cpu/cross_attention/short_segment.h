// The passes over a task of few float32 rows, such as one caption's self-attention: one block of
// weights, which stays in L1 with everything else. Keys, values and query rows enter the matmuls
// where they lie; only a transposed copy of the query rows, which lanes run along, is made.
#pragma once

#include "pass.h"

namespace {

class ShortSegment {
  static constexpr int64_t kMostQueries = 64, kMostKeys = 64;

  struct Layout : ScratchLayout {
    explicit Layout(int64_t dim) {
      weights = take(kMostKeys * kMostQueries);
      derivatives = take(kMostKeys * kMostQueries);
      query_columns = take(dim * kMostQueries);
      grad_columns = take(dim * kMostQueries);
      sums = take(dim * kMostQueries);
      last_rows = take(dim * kRegisterRows);
      largest = take(kMostQueries);
      reciprocal = take(kMostQueries);
      delta = take(kMostQueries);
    }
    int64_t weights, derivatives, query_columns, grad_columns, sums, last_rows, largest, reciprocal,
        delta;
  };

 public:
  static bool takes(const AttentionProblem& p, const AttentionTask& task) {
    return p.element == Element::kFloat32 && p.dim % kLanes == 0 && p.dim % kRegisterRows == 0 &&
           p.dim <= FloatDot::kMaxDepth && task.queries > 0 && task.queries <= kMostQueries &&
           task.attended == nullptr && task.attended_keys > 0 && task.attended_keys <= kMostKeys;
  }
  static int64_t scratch_floats(const AttentionProblem& p) {
    return p.dim <= FloatDot::kMaxDepth ? Layout(p.dim).total : 0;
  }

  mutable Prefetcher prefetcher;  // advances with the matmuls

  // Of a task that is taken.
  ShortSegment(const AttentionProblem& p, const AttentionTask& task, float* scratch)
      : p_(p),
        task_(task),
        n_(task.attended_keys),
        m_(round_up(task.queries, kLanes)),
        keys_(attended_rows(p, task, p.k).features),
        values_(attended_rows(p, task, p.v).features),
        at_(p.dim),
        scratch_(scratch) {}

  void run(const AttentionForward& out) {
    float *weights = scratch_ + at_.weights, *columns = scratch_ + at_.query_columns;
    float *largest = scratch_ + at_.largest, *reciprocal = scratch_ + at_.reciprocal;
    transpose(query_rows(p_, task_, p_.q), p_.scale < 0 ? -1.0f : 1.0f, columns);
    prefetch_next_task(*this, p_, task_, false);
    score(keys_, columns, weights);
    exponentials(block(), weights, largest, reciprocal);
    sum_for_queries(weights, values_);
    const OutputRows to = query_outputs(p_, task_, out.out);
    for (int64_t r = 0; r < task_.queries; ++r) {
      float* row = scratch_ + at_.sums + r * p_.dim;
      for (int64_t d = 0; d < p_.dim; d += kLanes) store(row + d, load(row + d) * reciprocal[r]);
      store_row(p_, row, to[r]);
    }
    std::memcpy(out.statistics + statistic(), largest, task_.queries * 4);
    std::memcpy(out.statistics + p_.heads * p_.total_queries + statistic(), reciprocal,
                task_.queries * 4);
    finish_streams();
  }

  void run(const AttentionBackward& out) {
    float *weights = scratch_ + at_.weights, *derivatives = scratch_ + at_.derivatives;
    float *columns = scratch_ + at_.query_columns, *grads = scratch_ + at_.grad_columns;
    const Features q = query_rows(p_, task_, p_.q), grad = query_rows(p_, task_, p_.grad);
    prepare(q, grad, out);
    prefetch_next_task(*this, p_, task_, true);
    score(keys_, columns, weights);
    score(values_, grads, derivatives);
    weight_gradients(block(), scratch_ + at_.largest, scratch_ + at_.reciprocal,
                     scratch_ + at_.delta, weights, derivatives);
    sum_for_keys(weights, grad, key_outputs(p_, task_, out.dv));
    sum_for_keys(derivatives, q, key_outputs(p_, task_, out.dk));
    sum_for_queries(derivatives, keys_);
    const OutputRows to = query_outputs(p_, task_, out.dq);
    for (int64_t r = 0; r < task_.queries; ++r)
      store_row(p_, scratch_ + at_.sums + r * p_.dim, to[r]);
    finish_streams();
  }

 private:
  WeightBlock block() const { return {p_, task_, 0, task_.queries, m_, 0, n_, logit_factor(p_)}; }
  // What a matmul calls between its blocks.
  auto step() const {
    return [this](int64_t words) { prefetcher.step(words); };
  }
  int64_t statistic() const { return task_.head * p_.total_queries + task_.first_query; }

  static const float* row_of(const Features& x, int64_t r) {
    return static_cast<const float*>(x.data) + r * x.stride;
  }
  static const uint32_t* words_of(const float* x) { return reinterpret_cast<const uint32_t*>(x); }

  // [dim][m] of query rows, zeros past the last.
  void transpose(const Features& x, float factor, float* out) const {
    for (int64_t r = 0; r < m_; r += kLanes)
      for (int64_t d = 0; d < p_.dim; d += kLanes) {
        Vec tile[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          tile[i] = r + i < task_.queries ? load(row_of(x, r + i) + d) * factor : Vec{};
        store_transposed(tile, reinterpret_cast<uint32_t*>(out + d * m_ + r), m_);
      }
  }

  // What the backward pass needs of query rows.
  void prepare(const Features& q, const Features& grad, const AttentionBackward& out) const {
    float *grads = scratch_ + at_.grad_columns, *outputs = scratch_ + at_.sums;
    transpose(q, p_.scale < 0 ? -1.0f : 1.0f, scratch_ + at_.query_columns);
    transpose(grad, 1.0f, grads);
    transpose(query_rows(p_, task_, out.out), 1.0f, outputs);
    dots_of_columns<FloatDot>(words_of(grads), words_of(outputs), p_.dim, m_, scratch_ + at_.delta);
    std::memset(scratch_ + at_.largest, 0, m_ * 4);
    std::memset(scratch_ + at_.reciprocal, 0, m_ * 4);  // padding: weights 0
    std::memcpy(scratch_ + at_.largest, out.statistics + statistic(), task_.queries * 4);
    std::memcpy(scratch_ + at_.reciprocal,
                out.statistics + p_.heads * p_.total_queries + statistic(), task_.queries * 4);
  }

  // [n][m]: dot products of rows of keys and queries. Matmuls take whole blocks of rows: those
  // beyond them are copied to one, of whose other rows nobody reads the results.
  void score(const Features& x, const float* columns, float* out) const {
    const int64_t whole = n_ / kRegisterRows * kRegisterRows;
    const auto multiply = [&](const float* rows, int64_t stride, int64_t count, float* c) {
      multiply_rows<FloatDot, Order::kDepthContiguous>(words_of(rows), stride, columns, m_, c, m_,
                                                       count, m_ / kLanes, p_.dim, false, true,
                                                       step(), nothing_done);
    };
    multiply(row_of(x, 0), x.stride, whole, out);
    if (whole == n_) return;
    float* last = scratch_ + at_.last_rows;
    std::memset(last, 0, kRegisterRows * p_.dim * 4);
    for (int64_t r = whole; r < n_; ++r)
      std::memcpy(last + (r - whole) * p_.dim, row_of(x, r), p_.dim * 4);
    multiply(last, p_.dim, kRegisterRows, out + whole * m_);
  }

  // Rows of queries [queries][dim]: of keys, or values, times the weights [n][m], in `sums`.
  void sum_for_queries(const float* weights, const Features& x) const {
    multiply_rows<FloatDot, Order::kRowContiguous>(
        words_of(weights), m_, row_of(x, 0), x.stride, scratch_ + at_.sums, p_.dim,
        round_up(task_.queries, kRegisterRows), p_.dim / kLanes, n_, false, true, step(),
        nothing_done);
  }

  // Rows of keys: of queries times the weights.
  void sum_for_keys(const float* weights, const Features& x, const OutputRows& to) const {
    const float* sums = scratch_ + at_.sums;
    multiply_rows<FloatDot, Order::kDepthContiguous>(
        words_of(weights), m_, row_of(x, 0), x.stride, scratch_ + at_.sums, p_.dim,
        round_up(n_, kRegisterRows), p_.dim / kLanes, task_.queries, false, false, step(),
        [&](int64_t r) {
          for (int64_t i = 0; i < kRegisterRows && r + i < n_; ++i)
            store_row(p_, sums + i * p_.dim, to[r + i]);
        });
  }

  const AttentionProblem& p_;
  const AttentionTask& task_;
  const int64_t n_, m_;  // keys, and padded query rows
  const Features keys_, values_;
  const Layout at_;
  float* scratch_;
};

}  // namespace
