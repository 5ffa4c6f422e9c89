// GEMM on AMX tiles for the operand layouts of simd_gemm.h.
#pragma once

#include "amx_tile.h"
#include "simd_gemm.h"

#if defined(__AMX_BF16__)

namespace {

// As simd_gemm.h's multiply for A with contiguous depth; `m` is a multiple of 32, alpha 1 where
// accumulating. The remainder of the depth after whole tiles is multiplied by SIMD instructions.
inline void multiply_panels(const uint32_t* a, int64_t lda, const float* b, float* c, int64_t ldc,
                            int64_t m, int64_t panels, int64_t depth, float alpha,
                            bool accumulate) {
  const int64_t whole = depth / kTile * kTile;
  compiler_barrier(c);
  for (int64_t p = 0; p < panels; ++p) {
    const float* panel = b + p * depth * kPanel;
    float* out = c + p * kPanel;
    for (int64_t i = 0; i < m && whole > 0; i += 2 * kTile) {
      float* block = out + i * ldc;
      tile_block<2, 2>({a + i * lda, lda}, {reinterpret_cast<const uint32_t*>(panel), kPanel},
                       block, ldc, whole, accumulate);
      if (alpha == 1.0f) continue;
      compiler_barrier(c);
      for (int64_t r = 0; r < 2 * kTile; ++r, block += ldc)
        for (int64_t j = 0; j < kPanel; j += kLanes) store(block + j, load(block + j) * alpha);
    }
    compiler_barrier(c);
    if (whole < depth)
      multiply<BFloat16Dot, Order::kDepthContiguous>(a + whole, lda, panel + whole * kPanel, out,
                                                     ldc, m, 1, depth - whole, alpha,
                                                     accumulate || whole > 0);
  }
  compiler_barrier(c);
}

// out[n][ld_out] = in[16 * k][ld_in] transposed, in words: n rows of `words` words, both multiples
// of 16.
inline void transpose_words(const uint32_t* in, int64_t ld_in, int64_t words, int64_t n,
                            uint32_t* out, int64_t ld_out) {
  for (int64_t k = 0; k < words; k += kTile)
    for (int64_t i = 0; i < n; i += kTile) {
      Vec rows[kTile];
      FASTVLP_UNROLL
      for (int j = 0; j < kTile; ++j)
        rows[j] = load(reinterpret_cast<const float*>(in + (k + j) * ld_in + i));
      store_transposed(rows, out + i * ld_out + k, ld_out);
    }
}

}  // namespace
#endif
