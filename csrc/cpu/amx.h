// Products of bfloat16 pairs on the matrix unit (AMX), for the operand layouts of gemm.h.
#pragma once

#include "gemm.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>

namespace {

constexpr int64_t kTileRows = 16;   // of A and C
constexpr int64_t kTileWords = 16;  // of depth, and columns of B and C

// Holds the matrix unit's state for its lifetime: eight tiles of 16 rows of 64 bytes.
class MatrixUnit {
 public:
  MatrixUnit() {
    alignas(64) uint8_t configuration[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      configuration[16 + 2 * tile] = 64;
      configuration[48 + tile] = kTileRows;
    }
    _tile_loadconfig(configuration);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// C[32, kPanel] (+)= A[32, depth] * B, whole tiles only. `b` is one packed panel.
inline void tile_product(const uint32_t* a, int64_t lda, const float* b, float* c, int64_t ldc,
                         int64_t depth, bool accumulate) {
  const int64_t a_step = lda * 4, c_step = ldc * 4, b_step = kPanel * 4;
  if (accumulate) {
    _tile_loadd(0, c, c_step);
    _tile_loadd(1, c + 16, c_step);
    _tile_loadd(2, c + kTileRows * ldc, c_step);
    _tile_loadd(3, c + kTileRows * ldc + 16, c_step);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTileWords) {
    _tile_loadd(4, a + k, a_step);
    _tile_loadd(5, a + k + kTileRows * lda, a_step);
    _tile_loadd(6, b + k * kPanel, b_step);
    _tile_loadd(7, b + k * kPanel + 16, b_step);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_step);
  _tile_stored(1, c + 16, c_step);
  _tile_stored(2, c + kTileRows * ldc, c_step);
  _tile_stored(3, c + kTileRows * ldc + 16, c_step);
}

// As gemm.h's multiply for A with contiguous depth and alpha 1; `m` is a multiple of 32. What is
// left of the depth after whole tiles goes through the vector units.
inline void multiply_tiles(const uint32_t* a, int64_t lda, const float* b, float* c, int64_t ldc,
                           int64_t m, int64_t panels, int64_t depth, bool accumulate) {
  const int64_t whole = depth / kTileWords * kTileWords;
  for (int64_t p = 0; p < panels; ++p) {
    const float* panel = b + p * depth * kPanel;
    float* out = c + p * kPanel;
    if (whole > 0)
      for (int64_t i = 0; i < m; i += 2 * kTileRows)
        tile_product(a + i * lda, lda, panel, out + i * ldc, ldc, whole, accumulate);
    if (whole < depth)
      multiply<BFloat16Dot, Order::kDepthContiguous>(a + whole, lda, panel + whole * kPanel, out,
                                                     ldc, m, 1, depth - whole, 1.0f,
                                                     accumulate || whole > 0);
  }
}

// out[n][ld_out] = in[16 * k][ld_in] transposed, in words: n rows of `words` words, both multiples
// of 16.
inline void transpose_words(const uint32_t* in, int64_t ld_in, int64_t words, int64_t n,
                            uint32_t* out, int64_t ld_out) {
  for (int64_t k = 0; k < words; k += 16)
    for (int64_t i = 0; i < n; i += 16) {
      __m512i r[16], t[16];
      FASTVLP_UNROLL
      for (int j = 0; j < 16; ++j) r[j] = _mm512_loadu_si512(in + (k + j) * ld_in + i);
      // Pairs of rows, then of pairs, then of 128-bit lanes: the four steps of a 16 x 16 transpose.
      FASTVLP_UNROLL
      for (int j = 0; j < 16; j += 2) {
        t[j] = _mm512_unpacklo_epi32(r[j], r[j + 1]);
        t[j + 1] = _mm512_unpackhi_epi32(r[j], r[j + 1]);
      }
      FASTVLP_UNROLL
      for (int j = 0; j < 16; j += 4) {
        r[j] = _mm512_unpacklo_epi64(t[j], t[j + 2]);
        r[j + 1] = _mm512_unpackhi_epi64(t[j], t[j + 2]);
        r[j + 2] = _mm512_unpacklo_epi64(t[j + 1], t[j + 3]);
        r[j + 3] = _mm512_unpackhi_epi64(t[j + 1], t[j + 3]);
      }
      FASTVLP_UNROLL
      for (int j = 0; j < 4; ++j) {
        t[j] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);
        t[j + 4] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
        t[j + 8] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88);
        t[j + 12] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xdd);
      }
      FASTVLP_UNROLL
      for (int j = 0; j < 8; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
      }
      FASTVLP_UNROLL
      for (int j = 0; j < 16; ++j) _mm512_storeu_si512(out + (i + j) * ld_out + k, r[j]);
    }
}

}  // namespace
#endif
