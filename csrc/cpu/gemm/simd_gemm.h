// Small matmuls on cache-resident tiles. A "word" is what one multiply-add step of the
// inner loop consumes per lane: one float, or a pair of bfloat16 that are neighbours along K.
// Plain loops over vector accumulators: at these tile sizes they reach the CPU's peak.
#pragma once

#include "../core/simd.h"

#define FASTVLP_UNROLL _Pragma("GCC unroll 16")

namespace {

#if defined(__AVX512F__)
constexpr int kRegisterRows = 8;
#else
constexpr int kRegisterRows = 4;
#endif
constexpr int kRegisterVectors = 2;
constexpr int kPanel = kRegisterVectors * kLanes;  // columns of one packed panel of B

// Up to kMaxDepth words of K are accumulated in registers before the sums go to memory.

// acc += a * b for floats.
struct FloatDot {
  static constexpr int kPerWord = 1;
  // One running sum over all of K rounds worse than a BLAS; sums of 64 do not.
  static constexpr int64_t kMaxDepth = 64;
  // Reads the word as a float: the compiler then broadcasts straight from memory, where a word in
  // a register costs a shuffle on a port that multiply-adds need.
  static Vec broadcast(const uint32_t* a) {
    typedef float __attribute__((may_alias)) Aliased;
    return splat(*reinterpret_cast<const Aliased*>(a));
  }
  static Vec step(Vec acc, Vec a, Vec b) { return acc + b * a; }
};

#if defined(__AVX512BF16__)
// acc += a.low * b.low + a.high * b.high for pairs of bfloat16, accumulated in fp32.
struct BFloat16Dot {
  static constexpr int kPerWord = 2;
  static constexpr int64_t kMaxDepth = 512;  // a packed panel stays in L1
  static Vec broadcast(const uint32_t* a) { return (Vec)_mm512_set1_epi32(static_cast<int>(*a)); }
  static Vec step(Vec acc, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// How the words of A lie in memory: rows of K (a[m * ld + k]) or rows of M (a[k * ld + m]).
enum class Order { kDepthContiguous, kRowContiguous };

// B lies as rows of `vectors` vectors, ldb words apart.
template <class Dot, Order order, int vectors>
inline void micro_kernel(const uint32_t* a, int64_t lda, const float* b, int64_t ldb, float* c,
                         int64_t ldc, int64_t depth, float alpha, bool accumulate) {
  Vec acc[kRegisterRows][vectors] = {};
  const uint32_t* row[kRegisterRows];
  FASTVLP_UNROLL
  for (int i = 0; i < kRegisterRows; ++i)
    row[i] = order == Order::kDepthContiguous ? a + i * lda : a + i;
  for (int64_t k = 0; k < depth; ++k) {
    Vec bv[vectors];
    FASTVLP_UNROLL
    for (int j = 0; j < vectors; ++j) bv[j] = load(b + k * ldb + j * kLanes);
    FASTVLP_UNROLL
    for (int i = 0; i < kRegisterRows; ++i) {
      const Vec word =
          Dot::broadcast(order == Order::kDepthContiguous ? row[i] + k : a + k * lda + i);
      FASTVLP_UNROLL
      for (int j = 0; j < vectors; ++j) acc[i][j] = Dot::step(acc[i][j], word, bv[j]);
    }
  }
  FASTVLP_UNROLL
  for (int i = 0; i < kRegisterRows; ++i) FASTVLP_UNROLL
  for (int j = 0; j < vectors; ++j) {
    float* p = c + i * ldc + j * kLanes;
    Vec v = acc[i][j] * alpha;
    if (accumulate) v = v + load(p);
    store(p, v);
  }
}

// C[m, panels * kPanel] = alpha * A[m, depth] * B (+ C when accumulate). `m` is a multiple of
// kRegisterRows; B is packed as panels of [depth][kPanel] words.
template <class Dot, Order order>
void multiply(const uint32_t* a, int64_t lda, const float* b, float* c, int64_t ldc, int64_t m,
              int64_t panels, int64_t depth, float alpha, bool accumulate) {
  for (int64_t k = 0; k < depth; k += Dot::kMaxDepth) {
    const int64_t part = depth - k < Dot::kMaxDepth ? depth - k : Dot::kMaxDepth;
    const uint32_t* ak = order == Order::kDepthContiguous ? a + k : a + k * lda;
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t i = 0; i < m; i += kRegisterRows)
        micro_kernel<Dot, order, kRegisterVectors>(
            order == Order::kDepthContiguous ? ak + i * lda : ak + i, lda,
            b + (p * depth + k) * kPanel, kPanel, c + i * ldc + p * kPanel, ldc, part, alpha,
            accumulate || k > 0);
  }
}

// The same with B [depth][vectors * kLanes] in rows that are ldb words apart. Where not `keep`,
// every kRegisterRows rows of C take the place of those before them. `between` is told the
// multiply-adds of words after each block of them, `done` the row of C whose block is complete.
template <class Dot, Order order, class Between, class Done>
void multiply_rows(const uint32_t* a, int64_t lda, const float* b, int64_t ldb, float* c,
                   int64_t ldc, int64_t m, int64_t vectors, int64_t depth, bool accumulate,
                   bool keep, const Between& between, const Done& done) {
  for (int64_t k = 0; k < depth; k += Dot::kMaxDepth) {
    const int64_t part = depth - k < Dot::kMaxDepth ? depth - k : Dot::kMaxDepth;
    const uint32_t* ak = order == Order::kDepthContiguous ? a + k : a + k * lda;
    for (int64_t i = 0; i < m; i += kRegisterRows) {
      const uint32_t* ai = order == Order::kDepthContiguous ? ak + i * lda : ak + i;
      for (int64_t j = 0; j < vectors; j += kRegisterVectors) {
        const float* bj = b + k * ldb + j * kLanes;
        float* cij = c + (keep ? i * ldc : 0) + j * kLanes;
        if (vectors - j >= kRegisterVectors)
          micro_kernel<Dot, order, kRegisterVectors>(ai, lda, bj, ldb, cij, ldc, part, 1.0f,
                                                     accumulate || k > 0);
        else
          micro_kernel<Dot, order, 1>(ai, lda, bj, ldb, cij, ldc, part, 1.0f, accumulate || k > 0);
        between(kRegisterRows * kRegisterVectors * kLanes * part);
      }
      if (k + part == depth) done(i);
    }
  }
}

}  // namespace
