// The forward and backward pass of one attention task over a Matmuls class.
#pragma once

#include <cmath>
#include <type_traits>

#include "../core/nontemporal_store.h"
#include "../core/scratch_layout.h"
#include "matmuls.h"
#include "softmax.h"

namespace {

using fastvlp::AttentionBackward;
using fastvlp::AttentionForward;
using fastvlp::AttentionInput;
using fastvlp::AttentionOutput;

template <class Matmuls>
struct ForwardLayout : ScratchLayout {
  ForwardLayout(const Matmuls& x, int64_t queries, int64_t attended_keys) {
    const int64_t n = x.padded_keys(attended_keys);
    const int64_t m = x.padded_queries(queries < x.kQueryBlock ? queries : x.kQueryBlock);
    row = take(x.row_words());
    key_rows = take(x.key_rows_words(n));
    value_columns = take(Matmuls::kWeightsUnpacked ? x.key_rows_words(n) : x.key_columns_words(n));
    query_columns = take(x.query_columns_words(m));
    weights = take(n * m);
    query_weights = take(x.query_weights_words(n, m));
    into_queries = take(x.into_queries_floats(m));
    origin = take(m);
    largest = take(m);
    reciprocal = take(m);
  }
  int64_t row, key_rows, value_columns, query_columns, weights, query_weights, into_queries, origin,
      largest, reciprocal;
};

// The operands of one block of query rows in the backward pass, offsets from the block's first
// word.
template <class Matmuls>
struct QueryLayout : ScratchLayout {
  QueryLayout(const Matmuls& x, int64_t m) {
    query_columns = take(x.query_columns_words(m));
    grad_columns = take(x.query_columns_words(m));
    query_rows = take(x.query_rows_words(m));
    grad_rows = take(x.query_rows_words(m));
    into_queries = take(x.into_queries_floats(m));
    origin = take(m);
    largest = take(m);
    reciprocal = take(m);
    delta = take(m);
  }
  int64_t query_columns, grad_columns, query_rows, grad_rows, into_queries, origin, largest,
      reciprocal, delta;
};

template <class Matmuls>
struct BackwardLayout : ScratchLayout {
  BackwardLayout(const Matmuls& x, int64_t queries)
      : m(x.padded_queries(queries < x.kQueryBlock ? queries : x.kQueryBlock)), block(x, m) {
    const int64_t n = x.padded_keys(x.kKeyBlock);
    row = take(x.row_words());
    key_rows = take(x.key_rows_words(n));
    key_columns = take(x.key_columns_words(n));
    value_rows = take(x.key_rows_words(n));
    weights = take(n * m);
    gradient = take(n * m);
    key_weights = take(x.key_weights_words(n, m));
    query_weights = take(x.query_weights_words(n, m));
    dk = take(n * x.padded_dim());
    dv = take(n * x.padded_dim());
    blocks = take((queries + x.kQueryBlock - 1) / x.kQueryBlock * block.total);
  }
  int64_t m;
  QueryLayout<Matmuls> block;
  int64_t row, key_rows, key_columns, value_rows, weights, gradient, key_weights, query_weights, dk,
      dv, blocks;
};

template <class Matmuls>
int64_t scratch_floats_with(const AttentionProblem& p, int64_t queries, int64_t attended_keys,
                            bool backward) {
  const Matmuls x(p.dim);
  return backward ? BackwardLayout<Matmuls>(x, queries).total
                  : ForwardLayout<Matmuls>(x, queries, attended_keys).total;
}

inline Features head_rows(const AttentionProblem& p, const AttentionInput& input, int64_t offset,
                          int64_t head, int64_t rows) {
  return {static_cast<const char*>(input.data) + (offset + head * input.head) * bytes_of(p.element),
          rows, input.row, p.element};
}

inline AttendedRows attended_rows(const AttentionProblem& p, const AttentionTask& task,
                                  const AttentionInput& input) {
  return {head_rows(p, input, task.segment * input.segment, task.head, task.keys), task.attended,
          task.attended_keys};
}

inline Features query_rows(const AttentionProblem& p, const AttentionTask& task,
                           const AttentionInput& input) {
  return head_rows(p, input, task.first_query * input.row, task.head, task.queries);
}

// How many of the attended keys any row of the block that ends at query row `end` may attend to.
inline int64_t visible(const AttentionProblem& p, const AttentionTask& task, int64_t end) {
  if (!p.causal) return task.attended_keys;
  const int64_t limit = end - task.queries + task.keys;  // first key it may not attend to
  // Without a list the attended keys are all, or none where a mask hides every key of the call.
  if (task.attended == nullptr)
    return limit < 0 ? 0 : limit < task.attended_keys ? limit : task.attended_keys;
  int64_t n = 0;
  while (n < task.attended_keys && task.attended[n] < limit) ++n;
  return n;
}

// Lets the matmuls of this task prefetch the rows of the next one.
template <class Matmuls>
void prefetch_next_task(const Matmuls& x, const AttentionProblem& p, const AttentionTask& task,
                        bool backward) {
  if (task.next == nullptr) return;
  const AttentionTask& next = *task.next;
  const int64_t matmuls = backward ? 5 : 2;
  x.prefetcher.start(p.dim, matmuls * task.queries * task.attended_keys * p.dim);
  x.prefetcher.add(attended_rows(p, next, p.k));
  x.prefetcher.add(attended_rows(p, next, p.v));
  x.prefetcher.add({query_rows(p, next, p.q), nullptr, next.queries});
  if (backward) x.prefetcher.add({query_rows(p, next, p.grad), nullptr, next.queries});
}

// Rows of an output of one segment and head.
struct OutputRows {
  char* data;
  int64_t step;  // bytes
  void* operator[](int64_t r) const { return data + r * step; }
};

inline OutputRows output_rows(const AttentionProblem& p, const AttentionOutput& out, int64_t offset,
                              int64_t head) {
  const int64_t size = bytes_of(p.element);
  return {static_cast<char*>(out.data) + (offset + head * out.head) * size, out.row * size};
}

inline OutputRows query_outputs(const AttentionProblem& p, const AttentionTask& task,
                                const AttentionOutput& out) {
  return output_rows(p, out, task.first_query * out.row, task.head);
}

inline OutputRows key_outputs(const AttentionProblem& p, const AttentionTask& task,
                              const AttentionOutput& out) {
  return output_rows(p, out, task.segment * out.segment, task.head);
}

inline void store_row(const AttentionProblem& p, const float* in, void* out) {
  if (p.element == fastvlp::Element::kFloat32 && p.streams)
    stream_row(in, p.dim, static_cast<float*>(out));
  else if (p.element == fastvlp::Element::kBFloat16)
    to_bfloat16_row(in, p.dim, static_cast<uint16_t*>(out), p.streams);
  else
    from_floats(in, p.dim, p.element, out);
}

// The rows of a block from their sums [dim][m], times `factor` where there is one. `rows` is
// scratch for kLanes of them.
template <class Matmuls>
void store_queries(const Matmuls& x, const WeightBlock& b, const float* in, const float* factor,
                   float* rows, const AttentionOutput& out) {
  const OutputRows to = query_outputs(b.p, b.task, out);
  const int64_t stride = x.padded_dim();
  for (int64_t r = 0; r < b.queries; r += kLanes) {
    const int64_t count = b.queries - r < kLanes ? b.queries - r : kLanes;
    const Vec scale = factor ? load(factor + r) : splat(1.0f);
    for (int64_t d = 0; d < stride; d += kLanes) {
      Vec tile[kLanes];
      for (int64_t j = 0; j < kLanes; ++j) tile[j] = load(in + (d + j) * b.m + r) * scale;
      store_transposed(tile, reinterpret_cast<uint32_t*>(rows + d), stride);
    }
    for (int64_t i = 0; i < count; ++i) store_row(b.p, rows + i * stride, to[b.first + r + i]);
  }
  finish_streams();
}

// Gradients of the attended keys [first, first + count).
template <class Matmuls>
void store_keys(const Matmuls& x, const AttentionProblem& p, const AttentionTask& task,
                int64_t first, int64_t count, const float* in, const AttentionOutput& out) {
  const OutputRows to = key_outputs(p, task, out);
  for (int64_t r = 0; r < count; ++r)
    store_row(p, in + r * x.padded_dim(), to[task.key(first + r)]);
}

// Zero to the gradients of keys that no query attends to.
inline void clear_masked(const AttentionProblem& p, const AttentionTask& task,
                         const AttentionOutput& out) {
  const int64_t attended_keys = task.queries > 0 ? task.attended_keys : 0;
  if (attended_keys == task.keys) return;
  const OutputRows to = key_outputs(p, task, out);
  for (int64_t key = 0, r = 0; key < task.keys; ++key)
    if (r < attended_keys && (task.attended == nullptr || task.attended[r] == key))
      ++r;
    else
      std::memset(to[key], 0, p.dim * bytes_of(p.element));
}

// Rows [n, padded n) of a block: no key is there.
template <class Matmuls>
void clear_padding(const Matmuls& x, const WeightBlock& b, float* weights) {
  std::memset(weights + b.n * b.m, 0, (x.padded_keys(b.n) - b.n) * b.m * 4);
}

// WeightBlock's factor. Never 0: the dot product of a masked key is -infinity and has to stay so.
// What stands for 0 makes any other dot product negligible.
inline float logit_factor(const AttentionProblem& p) {
  const float factor = (p.scale < 0 ? -p.scale : p.scale) * kLog2E;
  return factor < kSmallestNormal ? kSmallestNormal : factor;
}

template <class Matmuls>
WeightBlock block_at(const Matmuls& x, const AttentionProblem& p, const AttentionTask& task,
                     int64_t first) {
  const int64_t left = task.queries - first;
  const int64_t queries = left < x.kQueryBlock ? left : x.kQueryBlock;
  return {p,
          task,
          first,
          queries,
          x.padded_queries(queries),
          0,
          visible(p, task, first + queries),
          logit_factor(p)};
}

// Logits in units of ln 2 from this size on are rounded so coarsely that exponentials relative to
// the largest one, itself rounded, would leave the range of float. The passes then run again
// "relative": dot products are taken relative to the largest one, exactly where it matters, before
// they become logits. The statistics of such rows are that one and minus the reciprocal.
constexpr float kCoarseLogit = 0x1p29f;

// Whether the task has such a logit. Infinity and NaN stay in their rows as they are.
inline bool is_coarse(const AttentionProblem& p, const AttentionTask& task,
                      const float* statistics) {
  const float* largest = statistics + task.head * p.total_queries + task.first_query;
  bool fine = true;
  for (int64_t i = 0; i < task.queries; ++i)
    fine &= !(std::abs(largest[i]) >= kCoarseLogit && std::isfinite(largest[i]));
  return !fine;
}

// Whether the forward pass of the task was a relative one.
inline bool is_relative(const AttentionProblem& p, const AttentionTask& task,
                        const float* statistics) {
  const float* reciprocal = statistics + (p.heads + task.head) * p.total_queries + task.first_query;
  bool found = false;
  for (int64_t i = 0; i < task.queries; ++i) found |= reciprocal[i] < 0.0f;
  return found;
}

template <class Matmuls>
void forward_with(const AttentionProblem& p, const AttentionTask& task, const AttentionForward& out,
                  float* scratch, bool relative) {
  const Matmuls x(p.dim);
  const ForwardLayout<Matmuls> at(x, task.queries, task.attended_keys);
  uint32_t* words = reinterpret_cast<uint32_t*>(scratch);
  const KeyRows keys = x.key_rows(attended_rows(p, task, p.k), words + at.key_rows);
  const KeyRows value_columns =
      x.key_columns(attended_rows(p, task, p.v), words + at.value_columns);
  prefetch_next_task(x, p, task, false);
  const Features q = query_rows(p, task, p.q);
  float* weights = scratch + at.weights;
  float *largest = scratch + at.largest, *reciprocal = scratch + at.reciprocal;
  for (int64_t first = 0; first < task.queries; first += x.kQueryBlock) {
    const WeightBlock b = block_at(x, p, task, first);
    x.pack_query_columns(q, first, b.queries, p.scale < 0, words + at.query_columns,
                         words + at.row);
    x.scores(keys, words + at.query_columns, b.n, b.m, weights);
    if (relative) {
      find_largest(b, weights, scratch + at.origin);
      subtract(b, scratch + at.origin, weights);
    }
    exponentials(b, weights, largest, reciprocal);
    clear_padding(x, b, weights);
    const uint32_t* operand = words + at.weights;
    if constexpr (!Matmuls::kWeightsUnpacked) {
      x.pack_query_weights(weights, b.n, b.m, words + at.query_weights);
      operand = words + at.query_weights;
    }
    if (b.n > 0)
      x.into_queries(operand, value_columns, b.n, b.m, scratch + at.into_queries, false);
    else
      std::memset(scratch + at.into_queries, 0, x.into_queries_floats(b.m) * 4);
    store_queries(x, b, scratch + at.into_queries, reciprocal, scratch + at.row, out.out);
    const int64_t row = task.head * p.total_queries + task.first_query + first;
    if (relative) {
      std::memcpy(largest, scratch + at.origin, b.m * 4);
      for (int64_t i = 0; i < b.m; ++i) reciprocal[i] = -reciprocal[i];
    }
    std::memcpy(out.statistics + row, largest, b.queries * 4);
    std::memcpy(out.statistics + p.heads * p.total_queries + row, reciprocal, b.queries * 4);
  }
}

// What the backward pass needs of a block of query rows, in words from `at` on.
template <class Matmuls>
void prepare_queries(const Matmuls& x, const QueryLayout<Matmuls>& l, const WeightBlock& b,
                     const AttentionBackward& out, bool relative, uint32_t* row, uint32_t* at) {
  const Features q = query_rows(b.p, b.task, b.p.q), grad = query_rows(b.p, b.task, b.p.grad);
  x.pack_query_columns(q, b.first, b.queries, b.p.scale < 0, at + l.query_columns, row);
  x.pack_query_columns(grad, b.first, b.queries, false, at + l.grad_columns, row);
  x.pack_query_rows(q, b.first, b.queries, at + l.query_rows);
  x.pack_query_rows(grad, b.first, b.queries, at + l.grad_rows);
  const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(at + offset); };
  // delta, the sum over the keys of each weight times the gradient w.r.t. it, is the dot product of
  // the output and the gradient w.r.t. it.
  x.pack_query_columns(query_rows(b.p, b.task, out.out), b.first, b.queries, false,
                       at + l.into_queries, row);
  x.column_dots(at + l.grad_columns, at + l.into_queries, b.m, floats(l.delta));
  const int64_t first = b.task.head * b.p.total_queries + b.task.first_query + b.first;
  std::memset(at + l.largest, 0, b.m * 4);
  std::memset(at + l.reciprocal, 0, b.m * 4);  // padding: weights 0
  std::memcpy(at + l.largest, out.statistics + first, b.queries * 4);
  std::memcpy(at + l.reciprocal, out.statistics + b.p.heads * b.p.total_queries + first,
              b.queries * 4);
  if (relative) {
    std::memcpy(at + l.origin, at + l.largest, b.m * 4);
    std::memset(at + l.largest, 0, b.m * 4);
    for (int64_t i = 0; i < b.m; ++i) floats(l.reciprocal)[i] = std::abs(floats(l.reciprocal)[i]);
  }
  std::memset(at + l.into_queries, 0, x.into_queries_floats(b.m) * 4);
}

struct KeyBlock {
  int64_t first;  // of the attended keys
  int64_t n;
  KeyRows keys, values, key_columns;
};

// What a block of query rows, its operands at `block`, adds to the gradients of a block of keys and
// they to its own. The first one starts the sums, the last one completes and stores them.
template <class Matmuls>
void add_gradients(const Matmuls& x, const BackwardLayout<Matmuls>& at, const WeightBlock& b,
                   const KeyBlock& k, uint32_t* block, float* scratch, bool accumulate,
                   bool relative, const AttentionBackward& out) {
  const QueryLayout<Matmuls>& l = at.block;
  uint32_t* words = reinterpret_cast<uint32_t*>(scratch);
  const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(block + offset); };
  float *s = scratch + at.weights, *t = scratch + at.gradient;
  x.scores(k.keys, block + l.query_columns, b.n, b.m, s);
  x.scores(k.values, block + l.grad_columns, b.n, b.m, t);
  if (relative) subtract(b, floats(l.origin), s);
  weight_gradients(b, floats(l.largest), floats(l.reciprocal), floats(l.delta), s, t);
  const bool last = b.first + b.queries == b.task.queries;
  auto into_keys = [&](float* weights, int64_t rows, int64_t sums,
                       const AttentionOutput& gradient) {
    clear_padding(x, b, weights);
    const uint32_t* operand = reinterpret_cast<const uint32_t*>(weights);
    if constexpr (!Matmuls::kWeightsUnpacked) {
      x.pack_key_weights(weights, b.n, b.m, words + at.key_weights);
      operand = words + at.key_weights;
    }
    x.into_keys(operand, block + rows, b.n, b.m, b.queries, scratch + sums, accumulate,
                accumulate || !last, [&](int64_t r, int64_t count, const float* complete) {
                  if (last) store_keys(x, b.p, b.task, k.first + r, count, complete, gradient);
                });
  };
  into_keys(s, l.grad_rows, at.dv, out.dv);
  into_keys(t, l.query_rows, at.dk, out.dk);
  const uint32_t* operand = words + at.gradient;
  if constexpr (!Matmuls::kWeightsUnpacked) {
    x.pack_query_weights(t, b.n, b.m, words + at.query_weights);
    operand = words + at.query_weights;
  }
  x.into_queries(operand, k.key_columns, b.n, b.m, floats(l.into_queries), true);
}

// Walks the keys in blocks whose weights stay in L1 and L2, and for each the blocks of query
// rows: gradients of keys are complete after the last of these, those of queries at the end.
template <class Matmuls>
void backward_with(const AttentionProblem& p, const AttentionTask& task,
                   const AttentionBackward& out, float* scratch) {
  const bool relative = is_relative(p, task, out.statistics);
  const Matmuls x(p.dim);
  const BackwardLayout<Matmuls> at(x, task.queries);
  uint32_t* words = reinterpret_cast<uint32_t*>(scratch);
  const auto block_words = [&](int64_t first) {
    return words + at.blocks + first / x.kQueryBlock * at.block.total;
  };
  prefetch_next_task(x, p, task, true);
  for (int64_t first = 0; first < task.queries; first += x.kQueryBlock)
    prepare_queries(x, at.block, block_at(x, p, task, first), out, relative, words + at.row,
                    block_words(first));
  const AttendedRows attended = attended_rows(p, task, p.k);
  const AttendedRows values = attended_rows(p, task, p.v);
  for (int64_t key = 0; key < task.attended_keys && task.queries > 0; key += x.kKeyBlock) {
    const int64_t n =
        task.attended_keys - key < x.kKeyBlock ? task.attended_keys - key : x.kKeyBlock;
    KeyBlock k = {key,
                  n,
                  x.key_rows(attended.slice(key, n), words + at.key_rows),
                  x.key_rows(values.slice(key, n), words + at.value_rows),
                  {}};
    k.key_columns = k.keys;
    if constexpr (!Matmuls::kWeightsUnpacked)
      k.key_columns = x.key_columns(attended.slice(key, n), words + at.key_columns);
    bool accumulate = false;
    for (int64_t first = 0; first < task.queries; first += x.kQueryBlock) {
      WeightBlock b = block_at(x, p, task, first);
      if (b.n <= key) continue;  // causal; the last block attends to every key
      b.first_key = key, b.n = n;
      add_gradients(x, at, b, k, block_words(first), scratch, accumulate, relative, out);
      accumulate = true;
    }
  }
  for (int64_t first = 0; first < task.queries; first += x.kQueryBlock)
    store_queries(x, block_at(x, p, task, first),
                  reinterpret_cast<float*>(block_words(first) + at.block.into_queries), nullptr,
                  scratch + at.row, out.dq);
  clear_masked(p, task, out.dk);
  clear_masked(p, task, out.dv);
  finish_streams();
}

}  // namespace
