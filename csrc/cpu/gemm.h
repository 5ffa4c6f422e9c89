// Small matrix products on cache-resident tiles. A "word" is what one multiply-add step of the
// inner loop consumes per lane: one float, or a pair of bfloat16 that are neighbours along K.
// Plain loops over vector accumulators: at these tile sizes they run at the processor's peak.
#pragma once

#include "simd.h"

#define FASTVLP_UNROLL _Pragma("GCC unroll 16")

namespace {

#if defined(__AVX512F__)
constexpr int kRegisterRows = 8;
#else
constexpr int kRegisterRows = 4;
#endif
constexpr int kRegisterVectors = 2;
constexpr int kPanel = kRegisterVectors * kLanes;  // columns of one packed panel of B
#if defined(__AVX512F__)
// Where two panels are left, tiles of 4 x 4 vectors: a word of A then serves four multiply-adds,
// and on processors that broadcast in the units that multiply, its broadcast costs half as much.
constexpr int kWideRows = 4;
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

// `rows` rows of A by `panels` neighbouring panels of B, `panel_step` floats apart.
template <class Dot, Order order, int rows, int panels>
inline void micro_kernel(const uint32_t* a, int64_t lda, const float* b, int64_t panel_step,
                         float* c, int64_t ldc, int64_t depth, float alpha, bool accumulate) {
  constexpr int kVectors = panels * kRegisterVectors;
  Vec acc[rows][kVectors] = {};
  const uint32_t* row[rows];
  FASTVLP_UNROLL
  for (int i = 0; i < rows; ++i) row[i] = order == Order::kDepthContiguous ? a + i * lda : a + i;
  for (int64_t k = 0; k < depth; ++k) {
    Vec bv[kVectors];
    FASTVLP_UNROLL
    for (int j = 0; j < kVectors; ++j)
      bv[j] = load(b + j / kRegisterVectors * panel_step + k * kPanel +
                   j % kRegisterVectors * kLanes);
    FASTVLP_UNROLL
    for (int i = 0; i < rows; ++i) {
      const uint32_t word = order == Order::kDepthContiguous ? row[i][k] : a[k * lda + i];
      FASTVLP_UNROLL
      for (int j = 0; j < kVectors; ++j) acc[i][j] = Dot::step(acc[i][j], word, bv[j]);
    }
  }
  FASTVLP_UNROLL
  for (int i = 0; i < rows; ++i)
    FASTVLP_UNROLL
    for (int j = 0; j < kVectors; ++j) {
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
    int64_t p = 0;
    auto rows = [&]<int height, int wide>() {
      for (int64_t i = 0; i < m; i += height)
        micro_kernel<Dot, order, height, wide>(
            order == Order::kDepthContiguous ? ak + i * lda : ak + i, lda,
            b + (p * depth + k) * kPanel, depth * kPanel, c + i * ldc + p * kPanel, ldc, part,
            alpha, accumulate || k > 0);
    };
#if defined(__AVX512F__)
    for (; p + 2 <= panels; p += 2) rows.template operator()<kWideRows, 2>();
#endif
    for (; p < panels; ++p) rows.template operator()<kRegisterRows, 1>();
  }
}

}  // namespace
