// The GEMM implementation of a kernel: a policy that kernels are templates over. SimdGemm and
// AmxGemm read A as rows of contiguous depth and B as simd_gemm.h's packed panels.
#pragma once

#include "amx_gemm.h"

namespace {

template <class D>
struct SimdGemm {
  using Dot = D;
  struct State {};
  static constexpr int64_t kRows = kRegisterRows;  // rows of A come in multiples of it
  static constexpr bool kTransposed = false;       // A can have contiguous rows as well
  static constexpr bool kSplit = false;            // operands are floats or bfloat16
  static void multiply(const uint32_t* a, int64_t lda, const float* b, float* c, int64_t ldc,
                       int64_t m, int64_t panels, int64_t depth, float alpha, bool accumulate) {
    ::multiply<Dot, Order::kDepthContiguous>(a, lda, b, c, ldc, m, panels, depth, alpha,
                                             accumulate);
  }
};

#if defined(__AMX_BF16__)
struct AmxGemm {
  using Dot = BFloat16Dot;
  using State = TileSession;  // lives around the matmuls
  static constexpr int64_t kRows = 2 * kTile;
  static constexpr bool kTransposed = true;  // A with contiguous rows has to be transposed first
  static constexpr bool kSplit = false;
  static void multiply(const uint32_t* a, int64_t lda, const float* b, float* c, int64_t ldc,
                       int64_t m, int64_t panels, int64_t depth, float alpha, bool accumulate) {
    multiply_panels(a, lda, b, c, ldc, m, panels, depth, alpha, accumulate);
  }
};

// Float32 on AMX tiles, with operands of bf16x3_gemm.h.
struct Bf16x3Gemm {
  using Dot = FloatDot;
  using State = TileSession;
  static constexpr int64_t kRows = 2 * kTile;
  static constexpr bool kSplit = true;
};
#endif

}  // namespace

// function<Gemm> with the fastest GEMM of this instruction set, for bfloat16 operands or others.
#if defined(__AMX_BF16__)
#define FASTVLP_WITH_GEMM(function, bfloat16) \
  ((bfloat16) ? function<AmxGemm> : function<Bf16x3Gemm>)
#elif defined(__AVX512BF16__)
#define FASTVLP_WITH_GEMM(function, bfloat16) \
  ((bfloat16) ? function<SimdGemm<BFloat16Dot>> : function<SimdGemm<FloatDot>>)
#else
#define FASTVLP_WITH_GEMM(function, bfloat16) (function<SimdGemm<FloatDot>>)
#endif
