// The forward and backward pass of one attention task over a Products class.
#pragma once

#include <type_traits>

#include "attention_products.h"
#include "attention_softmax.h"
#include "narrow.h"

namespace {

using fastvlp::AttentionBackward;
using fastvlp::AttentionForward;
using fastvlp::AttentionInput;

// The buffers of one task in the scratch, each on a cache line of its own.
template <class Products>
struct Buffers {
  Buffers(const Products& x, bool dropout, int64_t queries, int64_t seen_keys, bool backward) {
    const int64_t n = x.padded_keys(seen_keys);
    const int64_t m = x.padded_queries(queries < x.kQueryBlock ? queries : x.kQueryBlock);
    row = take(x.row_words());
    key_rows = take(x.key_rows_words(n));
    key_columns = take(x.key_columns_words(n));
    query_columns = take(x.query_columns_words(m));
    weights = take(n * m);
    key_weights = take(x.key_weights_words(n, m));
    query_weights = take(x.query_weights_words(n, m));
    into_queries = take(x.into_queries_floats(m));
    largest = take(m);
    reciprocal = take(m);
    value_rows = take(x.key_rows_words(n));
    if (!backward) return;
    grad_columns = take(x.query_columns_words(m));
    query_rows = take(x.query_rows_words(m));
    grad_rows = take(x.query_rows_words(m));
    gradient = take(n * m);
    dropped = take(dropout ? n * m : 0);
    slope = take(m);
    dk = take(n * x.padded_dim());
    dv = take(n * x.padded_dim());
  }
  int64_t take(int64_t words) {
    const int64_t at = total;
    total += round_up(words, 16);
    return at;
  }
  int64_t total = 0;
  int64_t row, key_rows, key_columns, value_rows, query_columns, weights, key_weights,
      query_weights, into_queries, largest, reciprocal;
  int64_t grad_columns = 0, query_rows = 0, grad_rows = 0, gradient = 0, dropped = 0, slope = 0,
          dk = 0, dv = 0;
};

template <class Products>
int64_t scratch_floats_with(const AttentionProblem& p, int64_t queries, int64_t seen_keys,
                            bool backward) {
  return Buffers<Products>(Products(p.dim), p.drop_below > 0, queries, seen_keys, backward).total;
}

inline Features head_rows(const AttentionProblem& p, const AttentionInput& input, int64_t offset,
                          int64_t head, int64_t rows) {
  const int64_t size = p.element == fastvlp::Element::kFloat32 ? 4 : 2;
  return {static_cast<const char*>(input.data) + (offset + head * input.head) * size, rows,
          input.row, p.element};
}

inline SeenRows seen_rows(const AttentionProblem& p, const AttentionTask& task,
                          const AttentionInput& input, int64_t offset) {
  return {head_rows(p, input, offset, task.head, task.keys), task.seen, task.seen_keys};
}

inline Features query_rows(const AttentionProblem& p, const AttentionTask& task,
                           const AttentionInput& input) {
  return head_rows(p, input, task.first_query * input.row, task.head, task.queries);
}

// How many of the seen keys any row of the block that ends at query row `end` may see.
inline int64_t visible(const AttentionProblem& p, const AttentionTask& task, int64_t end) {
  if (!p.causal) return task.seen_keys;
  const int64_t limit = end - task.queries + task.keys;  // first key it may not see
  // Without a list the seen keys are all, or none where a mask hides every key of the call.
  if (task.seen == nullptr) return limit < 0 ? 0 : limit < task.seen_keys ? limit : task.seen_keys;
  int64_t n = 0;
  while (n < task.seen_keys && task.seen[n] < limit) ++n;
  return n;
}

// Lets the products of this task fetch the rows of the next one.
template <class Products>
void look_ahead(const Products& x, const AttentionProblem& p, const AttentionTask& task,
                bool backward) {
  if (task.next == nullptr) return;
  const AttentionTask& next = *task.next;
  const int64_t products = backward ? 5 : 2;
  x.ahead.start(p.dim, products * task.queries * task.seen_keys * p.dim);
  x.ahead.add(seen_rows(p, next, p.k, next.key_offset));
  x.ahead.add(seen_rows(p, next, p.v, next.value_offset));
  x.ahead.add({query_rows(p, next, p.q), nullptr, next.queries});
  if (backward) x.ahead.add({query_rows(p, next, p.grad), nullptr, next.queries});
}

inline void* output_row(const AttentionProblem& p, void* out, int64_t row, int64_t head) {
  const int64_t size = p.element == fastvlp::Element::kFloat32 ? 4 : 2;
  return static_cast<char*>(out) + (row * p.heads + head) * p.dim * size;
}

inline void store_row(const AttentionProblem& p, const float* in, void* out) {
  if (p.element == fastvlp::Element::kFloat32)
    stream_row(in, p.dim, static_cast<float*>(out));
  else if (p.element == fastvlp::Element::kBFloat16)
    to_bfloat16_row(in, p.dim, static_cast<uint16_t*>(out));
  else
    from_floats(in, p.dim, p.element, out);
}

// The rows of a block from the sums of into_queries, times `factor` where there is one. `rows` is
// scratch for kLanes of them.
template <class Products>
void store_queries(const Products& x, const WeightBlock& b, const float* in, const float* factor,
                   float* rows, void* out) {
  const int64_t stride = x.padded_dim();
  for (int64_t r = 0; r < b.queries; r += kLanes) {
    const int64_t count = b.queries - r < kLanes ? b.queries - r : kLanes;
    if constexpr (Products::kQueriesTransposed) {
      const Vec scale = factor ? load(factor + r) : splat(1.0f);
      for (int64_t d = 0; d < stride; d += kLanes) {
        Vec tile[kLanes];
        for (int64_t j = 0; j < kLanes; ++j) tile[j] = load(in + (d + j) * b.m + r) * scale;
        store_transposed(tile, reinterpret_cast<uint32_t*>(rows + d), stride);
      }
    } else {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t d = 0; d < stride; ++d)
          rows[i * stride + d] = in[(r + i) * stride + d] * (factor ? factor[r + i] : 1.0f);
    }
    for (int64_t i = 0; i < count; ++i)
      store_row(b.p, rows + i * stride,
                output_row(b.p, out, b.task.first_query + b.first + r + i, b.task.head));
  }
  finish_streams();
}

// The gradients of all the task's keys, zero for those not seen.
template <class Products>
void store_keys(const Products& x, const AttentionProblem& p, const AttentionTask& task,
                const float* in, void* out) {
  int64_t r = 0;
  for (int64_t key = 0; key < task.keys; ++key) {
    const bool seen = r < task.seen_keys && (task.seen == nullptr || task.seen[r] == key);
    void* to = output_row(p, out, task.first_key + key, task.head);
    if (seen)
      store_row(p, in + r++ * x.padded_dim(), to);
    else
      std::memset(to, 0, p.dim * (p.element == fastvlp::Element::kFloat32 ? 4 : 2));
  }
  finish_streams();
}

// Rows [n, padded n) of a block: no key is there.
template <class Products>
void clear_padding(const Products& x, const WeightBlock& b, float* weights) {
  std::memset(weights + b.n * b.m, 0, (x.padded_keys(b.n) - b.n) * b.m * 4);
}

template <class Products>
WeightBlock block_at(const Products& x, const AttentionProblem& p, const AttentionTask& task,
                     int64_t first) {
  const int64_t left = task.queries - first;
  const int64_t queries = left < x.kQueryBlock ? left : x.kQueryBlock;
  const float factor = (p.scale < 0 ? -p.scale : p.scale) * kLog2E;
  return {p,      task, first, queries, x.padded_queries(queries), visible(p, task, first + queries),
          factor};
}

template <class Products>
void forward_with(const AttentionProblem& p, const AttentionTask& task, const AttentionForward& out,
                  float* scratch) {
  const Products x(p.dim);
  const Buffers<Products> at(x, p.drop_below > 0, task.queries, task.seen_keys, false);
  uint32_t* words = reinterpret_cast<uint32_t*>(scratch);
  const KeyRows keys = x.key_rows(seen_rows(p, task, p.k, task.key_offset), words + at.key_rows);
  const KeyRows value_columns = x.key_columns(
      seen_rows(p, task, p.v, task.value_offset),
      words + (Products::kWeightsInPlace ? at.value_rows : at.key_columns));
  look_ahead(x, p, task, false);
  const Features q = query_rows(p, task, p.q);
  float* weights = scratch + at.weights;
  float *largest = scratch + at.largest, *reciprocal = scratch + at.reciprocal;
  for (int64_t first = 0; first < task.queries; first += x.kQueryBlock) {
    const WeightBlock b = block_at(x, p, task, first);
    x.pack_query_columns(q, first, b.queries, p.scale < 0, words + at.query_columns,
                         words + at.row);
    x.scores(keys, words + at.query_columns, b.n, b.m, weights);
    exponentials(b, weights, largest, reciprocal);
    clear_padding(x, b, weights);
    const uint32_t* operand = words + at.weights;
    if constexpr (!Products::kWeightsInPlace) {
      x.pack_query_weights(weights, b.n, b.m, words + at.query_weights);
      operand = words + at.query_weights;
    }
    if (b.n > 0)
      x.into_queries(operand, value_columns, b.n, b.m, scratch + at.into_queries);
    else
      std::memset(scratch + at.into_queries, 0, x.into_queries_floats(b.m) * 4);
    store_queries(x, b, scratch + at.into_queries, reciprocal, scratch + at.row,
                  out.out);
    const int64_t row = task.head * p.total_queries + task.first_query + first;
    std::memcpy(out.statistics + row, largest, b.queries * 4);
    std::memcpy(out.statistics + p.heads * p.total_queries + row, reciprocal, b.queries * 4);
  }
}

template <class Products>
void backward_with(const AttentionProblem& p, const AttentionTask& task,
                   const AttentionBackward& out, float* scratch) {
  const Products x(p.dim);
  const Buffers<Products> at(x, p.drop_below > 0, task.queries, task.seen_keys, true);
  uint32_t* words = reinterpret_cast<uint32_t*>(scratch);
  const SeenRows seen = seen_rows(p, task, p.k, task.key_offset);
  const KeyRows keys = x.key_rows(seen, words + at.key_rows);
  const KeyRows values =
      x.key_rows(seen_rows(p, task, p.v, task.value_offset), words + at.value_rows);
  KeyRows key_columns = keys;
  if constexpr (!Products::kWeightsInPlace)
    key_columns = x.key_columns(seen, words + at.key_columns);
  look_ahead(x, p, task, true);
  const Features q = query_rows(p, task, p.q);
  const Features grad = query_rows(p, task, p.grad);
  float *s = scratch + at.weights, *t = scratch + at.gradient, *slope = scratch + at.slope;
  float *largest = scratch + at.largest, *reciprocal = scratch + at.reciprocal;
  float* dropped = p.drop_below ? scratch + at.dropped : s;
  float *dk = scratch + at.dk, *dv = scratch + at.dv;
  const int64_t key_floats = x.padded_keys(task.seen_keys) * x.padded_dim();
  if (p.causal || task.queries == 0) {
    std::memset(dk, 0, key_floats * 4);
    std::memset(dv, 0, key_floats * 4);
  }
  for (int64_t first = 0; first < task.queries; first += x.kQueryBlock) {
    const WeightBlock b = block_at(x, p, task, first);
    const int64_t row = task.head * p.total_queries + task.first_query + first;
    std::memset(largest, 0, b.m * 4);
    std::memset(reciprocal, 0, b.m * 4);  // padding: weights 0
    std::memcpy(largest, out.statistics + row, b.queries * 4);
    std::memcpy(reciprocal, out.statistics + p.heads * p.total_queries + row, b.queries * 4);
    x.pack_query_columns(q, first, b.queries, p.scale < 0, words + at.query_columns,
                         words + at.row);
    x.pack_query_columns(grad, first, b.queries, false, words + at.grad_columns, words + at.row);
    x.pack_query_rows(q, first, b.queries, words + at.query_rows);
    x.pack_query_rows(grad, first, b.queries, words + at.grad_rows);
    x.scores(keys, words + at.query_columns, b.n, b.m, s);
    x.scores(values, words + at.grad_columns, b.n, b.m, t);
    weights_again(b, largest, reciprocal, s, t, dropped, slope);
    clear_padding(x, b, dropped);
    const bool accumulate = p.causal || first > 0;
    auto into_keys = [&](const float* weights, int64_t rows, float* sums) {
      const uint32_t* operand = reinterpret_cast<const uint32_t*>(weights);
      if constexpr (!Products::kWeightsInPlace) {
        x.pack_key_weights(weights, b.n, b.m, words + at.key_weights);
        operand = words + at.key_weights;
      }
      x.into_keys(operand, words + rows, b.n, b.m, b.queries, sums, accumulate);
    };
    into_keys(dropped, at.grad_rows, dv);
    product_gradient(b, s, slope, t);
    clear_padding(x, b, t);
    into_keys(t, at.query_rows, dk);
    const uint32_t* operand = words + at.gradient;
    if constexpr (!Products::kWeightsInPlace) {
      x.pack_query_weights(t, b.n, b.m, words + at.query_weights);
      operand = words + at.query_weights;
    }
    if (b.n > 0)
      x.into_queries(operand, key_columns, b.n, b.m, scratch + at.into_queries);
    else
      std::memset(scratch + at.into_queries, 0, x.into_queries_floats(b.m) * 4);
    store_queries(x, b, scratch + at.into_queries, nullptr, scratch + at.row, out.dq);
  }
  store_keys(x, p, task, dk, out.dk);
  store_keys(x, p, task, dv, out.dv);
}

}  // namespace
