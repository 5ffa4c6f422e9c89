// Optimal transport by proximal point iterations (IPOT) on one matrix that stays in cache.
//
// One iteration of the textbook form is Q = A * T; delta = 1 / (m Q sigma); sigma = 1 / (n Q^T
// delta); T = diag(delta) Q diag(sigma): five passes over the matrix. Here T is never stored: Q of
// the next iteration is made from Q, delta and sigma of the last one while its product with sigma
// is taken, and a block of columns at a time, whose delta is then known and whose second product
// follows from the first-level cache. That is one read of A and Q and one write of Q an iteration.
//
// Matrices lie as [rows of x][columns of y], y across the vector lanes; A is 0 in the lanes past
// the last column. delta belongs to the columns, sigma to the rows.
#pragma once

#include "simd.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace {

// Entries of a plan die out geometrically. Below the smallest normal number they change nothing,
// but each operation on one would trap into microcode: they become 0 while this lives.
class FlushSubnormals {
#if defined(__SSE__)
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
 public:
  FlushSubnormals() {}
  ~FlushSubnormals() {}
#endif
};

struct Transport {
  const float* a;
  float* q;
  int64_t stride;  // of both, a multiple of kLanes
  int64_t rows;
  int64_t cols;
  float* delta;    // [stride]
  float* sigma;    // [rows]
  float* partial;  // [rows][kLanes]: products with delta, not yet summed over the lanes
};

// 1 / (count * sum), and 0 for a sum of nothing.
inline Vec balance(Vec sum, float count) {
  return sum == 0.0f ? splat(0.0f) : 1.0f / (sum * count);
}

// Columns [first, first + V * kLanes) of one iteration: Q, unless it stays as it is, then delta,
// then this block's part of Q delta.
template <int V, bool advance>
void sweep(const Transport& t, int64_t first) {
  const float* a = t.a + first;
  float* q = t.q + first;
  float* delta = t.delta + first;
  Vec d[V], sum[V] = {};
  for (int v = 0; v < V; ++v) d[v] = load(delta + v * kLanes);
  for (int64_t i = 0; i < t.rows; ++i) {
    const Vec sigma = splat(t.sigma[i]);
    for (int v = 0; v < V; ++v) {
      Vec e = load(q + i * t.stride + v * kLanes);
      if constexpr (advance) {
        e = e * d[v] * sigma * load(a + i * t.stride + v * kLanes);
        store(q + i * t.stride + v * kLanes, e);
      }
      sum[v] = sum[v] + e * sigma;
    }
  }
  for (int v = 0; v < V; ++v) {
    d[v] = balance(sum[v], static_cast<float>(t.cols));
    store(delta + v * kLanes, d[v]);
  }
  for (int64_t i = 0; i < t.rows; ++i) {
    Vec part = load(t.partial + i * kLanes);
    for (int v = 0; v < V; ++v) part = part + load(q + i * t.stride + v * kLanes) * d[v];
    store(t.partial + i * kLanes, part);
  }
}

// The last columns: at most V vectors of them, all at once, because a lone vector would wait for
// its own sums.
template <int V, bool advance>
void sweep_rest(const Transport& t, int64_t first) {
  if (first + V * kLanes == t.stride)
    sweep<V, advance>(t, first);
  else if constexpr (V > 1)
    sweep_rest<V - 1, advance>(t, first);
}

template <bool advance>
void iterate_once(const Transport& t) {
  constexpr int V = 4;
  std::memset(t.partial, 0, t.rows * kVectorBytes);
  int64_t first = 0;
  for (; first + 2 * V * kLanes <= t.stride; first += V * kLanes) sweep<V, advance>(t, first);
  sweep_rest<2 * V - 1, advance>(t, first);
  for (int64_t i = 0; i < t.rows; ++i) {
    const float sum = horizontal_sum(load(t.partial + i * kLanes));
    t.sigma[i] = sum == 0.0f ? 0.0f : 1.0f / (sum * static_cast<float>(t.rows));
  }
}

// Leaves Q, delta and sigma whose product is the plan. A common factor of T cancels in delta, so
// the first Q is made from ones and the first sigma.
inline void solve_transport(const Transport& t, int64_t iterations, int64_t inner) {
  const FlushSubnormals flush;
  for (int64_t i = 0; i < t.rows; ++i) {
    t.sigma[i] = 1.0f / static_cast<float>(t.rows);
    for (int64_t j = 0; j < t.stride; j += kLanes) store(t.q + i * t.stride + j, splat(1.0f));
  }
  for (int64_t j = 0; j < t.stride; j += kLanes) store(t.delta + j, splat(1.0f));
  for (int64_t n = 0; n < iterations; ++n) {
    iterate_once<true>(t);
    for (int64_t k = 1; k < inner; ++k) iterate_once<false>(t);
  }
}

}  // namespace
