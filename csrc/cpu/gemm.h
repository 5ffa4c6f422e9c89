// Small matrix products on cache-resident tiles. A "word" is what one multiply-add step of the
// inner loop consumes per lane: one float, or a pair of bfloat16 that are neighbours along K.
// Plain loops over vector accumulators: at these tile sizes they run at the processor's peak.
#pragma once

#include "simd.h"

#define FASTVLP_UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int kPanelVectors = 2;
constexpr int kPanel = kPanelVectors * kLanes;  // columns of one packed panel of B

// The accumulators of one step: rows of A by panels of B. Sixteen vectors either way, but a step
// of 4 x 2 panels loads 8 words and vectors for its 16 multiply-adds where 8 x 1 loads 10, more
// than the load units of some processors bring. A last single panel takes kRegisterRows x 1.
#if defined(__AVX512F__)
constexpr int kRegisterRows = 8;
constexpr int kWideRows = 4, kWidePanels = 2;
#else
constexpr int kRegisterRows = 4;
constexpr int kWideRows = kRegisterRows, kWidePanels = 1;
#endif

// Products add up to kMaxDepth words of K in registers before they go to memory.

// acc += a * b for floats.
struct FloatDot {
  static constexpr int kPerWord = 1;
  // One running sum over all of K rounds worse than a vendor's product; sums of 64 do not.
  static constexpr int64_t kMaxDepth = 64;
  static Vec step(Vec acc, uint32_t a, Vec b) {
    float f;
    std::memcpy(&f, &a, 4);
    return acc + b * splat(f);
  }
};

#if defined(__AVX512BF16__)
// acc += a.low * b.low + a.high * b.high for pairs of bfloat16, accumulated in fp32.
struct BFloat16Dot {
  static constexpr int kPerWord = 2;
  static constexpr int64_t kMaxDepth = 512;  // a packed panel stays in the first-level cache
  static Vec step(Vec acc, uint32_t a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)),
                                 (__m512bh)b);
  }
};
#endif

// How the words of A lie in memory: rows of K (a[m * ld + k]) or rows of M (a[k * ld + m]).
enum class Order { kDepthContiguous, kRowContiguous };

// `panel_step` floats lie between the panels of B.
template <class Dot, Order order, int rows, int panels>
inline void micro_kernel(const uint32_t* a, int64_t lda, const float* b, int64_t panel_step,
                         float* c, int64_t ldc, int64_t depth, float alpha, bool accumulate) {
  constexpr int vectors = panels * kPanelVectors;
  Vec acc[rows][vectors] = {};
  const uint32_t* row[rows];
  FASTVLP_UNROLL
  for (int i = 0; i < rows; ++i)
    row[i] = order == Order::kDepthContiguous ? a + i * lda : a + i;
  for (int64_t k = 0; k < depth; ++k) {
    Vec bv[vectors];
    FASTVLP_UNROLL
    for (int j = 0; j < vectors; ++j)
      bv[j] = load(b + j / kPanelVectors * panel_step + k * kPanel + j % kPanelVectors * kLanes);
    FASTVLP_UNROLL
    for (int i = 0; i < rows; ++i) {
      const uint32_t word = order == Order::kDepthContiguous ? row[i][k] : a[k * lda + i];
      FASTVLP_UNROLL
      for (int j = 0; j < vectors; ++j) acc[i][j] = Dot::step(acc[i][j], word, bv[j]);
    }
  }
  FASTVLP_UNROLL
  for (int i = 0; i < rows; ++i)
    FASTVLP_UNROLL
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
  const int64_t panel_step = depth * kPanel, row_step = order == Order::kDepthContiguous ? lda : 1;
  for (int64_t k = 0; k < depth; k += Dot::kMaxDepth) {
    const int64_t part = depth - k < Dot::kMaxDepth ? depth - k : Dot::kMaxDepth;
    const uint32_t* ak = order == Order::kDepthContiguous ? a + k : a + k * lda;
    const bool add = accumulate || k > 0;
    int64_t p = 0;
    for (; p + kWidePanels <= panels; p += kWidePanels)
      for (int64_t i = 0; i < m; i += kWideRows)
        micro_kernel<Dot, order, kWideRows, kWidePanels>(
            ak + i * row_step, lda, b + p * panel_step + k * kPanel, panel_step,
            c + i * ldc + p * kPanel, ldc, part, alpha, add);
    for (; p < panels; ++p)
      for (int64_t i = 0; i < m; i += kRegisterRows)
        micro_kernel<Dot, order, kRegisterRows, 1>(
            ak + i * row_step, lda, b + p * panel_step + k * kPanel, panel_step,
            c + i * ldc + p * kPanel, ldc, part, alpha, add);
  }
}

}  // namespace
