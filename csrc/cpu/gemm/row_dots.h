// Dot products of rows with rows, both contiguous along the depth: C = X Y^T without packing either
// side. Lanes run along the depth and are summed at the end, which also rounds better than one
// running sum.
#pragma once

#include "../core/simd.h"

namespace {

// Rows of X and of Y in one register tile.
#if defined(__AVX512F__)
constexpr int kDotRowsX = 4, kDotRowsY = 6;
#else
constexpr int kDotRowsX = 3, kDotRowsY = 3;
#endif

inline void dot_tile(const float* x, const float* y, int64_t stride, int64_t depth, float* c,
                     int64_t c_stride) {
  Vec sum[kDotRowsX][kDotRowsY] = {};
  for (int64_t d = 0; d < depth; d += kLanes) {
    Vec right[kDotRowsY];
    _Pragma("GCC unroll 8") for (int j = 0; j < kDotRowsY; ++j) right[j] = load(y + j * stride + d);
    _Pragma("GCC unroll 8") for (int i = 0; i < kDotRowsX; ++i) {
      const Vec left = load(x + i * stride + d);
      _Pragma("GCC unroll 8") for (int j = 0; j < kDotRowsY; ++j) sum[i][j] =
          sum[i][j] + left * right[j];
    }
  }
  for (int i = 0; i < kDotRowsX; ++i)
    for (int j = 0; j < kDotRowsY; ++j) c[i * c_stride + j] = horizontal_sum(sum[i][j]);
}

// C[rows_x][kDotRowsY] of kDotRowsY rows of Y, which stay in L1 while all of X
// passes by; X is padded to whole tiles and depth is a multiple of kLanes.
inline void row_dots(const float* x, int64_t rows_x, const float* y, int64_t stride, int64_t depth,
                     float* c, int64_t c_stride) {
  for (int64_t i = 0; i < rows_x; i += kDotRowsX)
    dot_tile(x + i * stride, y, stride, depth, c + i * c_stride, c_stride);
}

}  // namespace
