// Optimal transport by proximal point iterations (IPOT) on one matrix that stays in cache.
//
// One iteration of the textbook form is Q = A * T; delta = 1 / (m Q sigma); sigma = 1 / (n Q^T
// delta); T = diag(delta) Q diag(sigma): five passes over the matrix. Here T is never stored: Q of
// the next iteration is made from Q, delta and sigma of the last one while its product with sigma
// is taken, and a block of columns at a time, whose delta is then known and whose second product
// follows from L1. That is one read of A and Q and one write of Q an iteration.
//
// Matrices lie as [rows of x][columns of y], y across the vector lanes; A is 0 in the lanes past
// the last column. delta belongs to the columns, sigma to the rows.
//
// An entry of T may fall below the smallest float and come back later: where the words and patches
// that match hold different shares of the mass, the rest has to take a route whose entries die out
// first and return once delta and sigma have grown. A float that became 0 stays 0. So the products
// of all deltas and of all sigmas are followed as logarithms, which tell at the end what each entry
// would be; where one that is 0 would not be tiny, the pair is solved again with all entries as
// logarithms, in double. (Plain doubles would lose such entries too, a few times later.)
#pragma once

#include <cmath>
#include <limits>

#include "../core/simd.h"

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
  float* delta;      // [stride]
  float* sigma;      // [rows]
  float* partial;    // [rows][kLanes]: products with delta, not yet summed over the lanes
  float* delta_log;  // [stride]: log2 of the product of all deltas so far
  float* sigma_log;  // [rows, rounded up to vectors]: the same of the sigmas
};

// log2(x) within 0.01 for x > 0. Infinite for 0 and NaN: such a delta or sigma has left the range.
inline Vec rough_log2(Vec x) {
  const VecI exponent = (VecI)((VecU)x - 0x3f800000u);  // unsigned: what is no result may be any
  const Vec linear = __builtin_convertvector(exponent, Vec) * 0x1p-23f;
  const Vec fraction = (Vec)((bits(x) & 0x007fffff) | 0x3f800000) - 1.0f;
  return x > 0.0f ? linear + 0.346f * fraction * (1.0f - fraction) : splat(__builtin_inff());
}

// Takes the deltas and sigmas of the last iteration into the logarithms of all.
inline void follow(const Transport& t) {
  for (int64_t j = 0; j < t.stride; j += kLanes)
    store(t.delta_log + j, load(t.delta_log + j) + rough_log2(load(t.delta + j)));
  for (int64_t i = 0; i < t.rows; i += kLanes)
    store(t.sigma_log + i, load(t.sigma_log + i) + rough_log2(load(t.sigma + i)));
}

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
inline void iterate(const Transport& t, int64_t iterations, int64_t inner) {
  const FlushSubnormals flush;
  for (int64_t i = 0; i < t.rows; ++i) {
    t.sigma[i] = 1.0f / static_cast<float>(t.rows);
    for (int64_t j = 0; j < t.stride; j += kLanes) store(t.q + i * t.stride + j, splat(1.0f));
  }
  for (int64_t i = 0; i < t.rows; i += kLanes) store(t.sigma_log + i, Vec{});
  for (int64_t j = 0; j < t.stride; j += kLanes) {
    store(t.delta + j, splat(1.0f));
    store(t.delta_log + j, Vec{});
  }
  for (int64_t n = 0; n < iterations; ++n) {
    follow(t);
    iterate_once<true>(t);
    for (int64_t k = 1; k < inner; ++k) iterate_once<false>(t);
  }
  follow(t);
}

// Whether an entry of the plan is 0 that would be above 2^-70, or one of delta and sigma has left
// the range of float.
inline bool left_range(const Transport& t, const float* cosine, float beta, int64_t iterations) {
  // The error of rough_log2 may be the same in every iteration.
  const float tiny = -70.0f - 0.02f * static_cast<float>(iterations);
  const float rate = 1.44269504f * static_cast<float>(iterations) / beta;
  for (int64_t j = t.cols; j < t.stride; ++j) t.delta_log[j] = -__builtin_inff();
  VecI left = {};
  for (int64_t i = 0; i < t.rows; ++i) {
    if (!(t.sigma_log[i] < __builtin_inff())) return true;
    for (int64_t j = 0; j < t.stride; j += kLanes) {
      const int64_t at = i * t.stride + j;
      const Vec expected =
          (load(cosine + at) - 1.0f) * rate + t.sigma_log[i] + load(t.delta_log + j);
      const Vec plan = load(t.q + at) * load(t.delta + j) * t.sigma[i];
      left |= ~((plan > 0.0f) | (expected < tiny));
    }
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (left[lane] != 0) return true;
  return false;
}

// log(sum_k exp(z_k)), fed value by value.
class LogSum {
 public:
  void add(double z) {
    if (z > top_) {
      sum_ = sum_ * std::exp(top_ - z) + 1.0;
      top_ = z;
    } else {
      sum_ += std::exp(z - top_);
    }
  }
  double value() const { return top_ + std::log(sum_); }

 private:
  double top_ = -std::numeric_limits<double>::infinity(), sum_ = 0.0;
};

// The same iterations on logarithms in double, in the order of the reference. `wide` has room for
// wide_doubles. Leaves the plan in Q, and ones in delta and sigma.
inline void solve_in_logarithms(const Transport& t, const float* cosine, float beta,
                                int64_t iterations, int64_t inner, double* wide) {
  double *q = wide, *delta = q + t.rows * t.cols, *sigma = delta + t.cols;
  const double log_rows = std::log(static_cast<double>(t.rows));
  const double log_cols = std::log(static_cast<double>(t.cols));
  for (int64_t k = 0; k < t.rows * t.cols; ++k) q[k] = 0.0;
  for (int64_t i = 0; i < t.rows; ++i) sigma[i] = -log_rows;
  for (int64_t n = 0; n < iterations; ++n) {
    for (int64_t i = 0; i < t.rows; ++i)
      for (int64_t j = 0; j < t.cols; ++j)
        q[i * t.cols + j] += (cosine[i * t.stride + j] - 1.0) / beta;
    for (int64_t k = 0; k < inner; ++k) {
      for (int64_t j = 0; j < t.cols; ++j) {
        LogSum sum;
        for (int64_t i = 0; i < t.rows; ++i) sum.add(q[i * t.cols + j] + sigma[i]);
        delta[j] = -log_cols - sum.value();
      }
      for (int64_t i = 0; i < t.rows; ++i) {
        LogSum sum;
        for (int64_t j = 0; j < t.cols; ++j) sum.add(q[i * t.cols + j] + delta[j]);
        sigma[i] = -log_rows - sum.value();
      }
    }
    for (int64_t i = 0; i < t.rows; ++i)
      for (int64_t j = 0; j < t.cols; ++j) q[i * t.cols + j] += sigma[i] + delta[j];
  }
  for (int64_t i = 0; i < t.rows; ++i) {
    t.sigma[i] = 1.0f;
    for (int64_t j = 0; j < t.stride; ++j)
      t.q[i * t.stride + j] = j < t.cols ? static_cast<float>(std::exp(q[i * t.cols + j])) : 0.0f;
  }
  for (int64_t j = 0; j < t.stride; ++j) t.delta[j] = 1.0f;
}

inline int64_t wide_doubles(int64_t rows, int64_t cols) { return rows * cols + rows + cols; }

// Leaves Q, delta and sigma whose product is the plan for the costs 1 - cosine.
inline void solve_transport(const Transport& t, const float* cosine, float beta, int64_t iterations,
                            int64_t inner, double* wide) {
  iterate(t, iterations, inner);
  if (left_range(t, cosine, beta, iterations))
    solve_in_logarithms(t, cosine, beta, iterations, inner, wide);
}

}  // namespace
