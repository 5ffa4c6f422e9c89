// Which units of the processor run a kernel's products: a policy that kernels are templates over.
// Vector and matrix units read A as rows of contiguous depth and B as gemm.h's packed panels.
#pragma once

#include "amx_gemm.h"

namespace {

template <class D>
struct VectorUnits {
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
struct MatrixUnits {
  using Dot = BFloat16Dot;
  using State = TileSession;  // lives around the products
  static constexpr int64_t kRows = 2 * kTile;
  static constexpr bool kTransposed = true;  // A with contiguous rows has to be transposed first
  static constexpr bool kSplit = false;
  static void multiply(const uint32_t* a, int64_t lda, const float* b, float* c, int64_t ldc,
                       int64_t m, int64_t panels, int64_t depth, float alpha, bool accumulate) {
    multiply_panels(a, lda, b, c, ldc, m, panels, depth, alpha, accumulate);
  }
};

// Floats on the tiles, as operands of split_tiles.h.
struct SplitUnits {
  using Dot = FloatDot;
  using State = TileSession;
  static constexpr int64_t kRows = 2 * kTile;
  static constexpr bool kSplit = true;
};
#endif

}  // namespace
