// Products on AMX tiles. A is [m][k] words in rows, B is [k][n] words in rows, where a word is a
// pair of bfloat16 that are neighbours along K, and C is [m][n] floats; m, n and k are multiples of
// 16, the side of a tile.
//
// Floats enter as three planes of bfloat16, x = x0 + x1 + x2 with 8 bits of the significand each.
// Six of the nine products of planes reach the rounding of a float product; the other three lie
// below it.
#pragma once

#if defined(__AMX_BF16__)

#include "simd.h"

namespace {

constexpr int64_t kTile = 16;

// All eight tiles 16 rows of 64 bytes, while the object lives.
class TileSession {
 public:
  TileSession() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
};

// Planes of one operand: plane p starts p * step words after the first.
struct TileOperand {
  const uint32_t* words;
  int64_t stride;  // words from one row to the next
  int64_t step;
};

// One product of planes for a block of rows x cols tiles of C.
template <int rows, int cols>
inline void tile_step(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb) {
  _tile_loadd(4, a, lda * 4);
  if constexpr (rows > 1) _tile_loadd(5, a + kTile * lda, lda * 4);
  _tile_loadd(6, b, ldb * 4);
  if constexpr (cols > 1) _tile_loadd(7, b + kTile, ldb * 4);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (cols > 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (rows > 1) _tile_dpbf16ps(2, 5, 6);
  if constexpr (rows > 1 && cols > 1) _tile_dpbf16ps(3, 5, 7);
}

template <int planes, int rows, int cols>
inline void tile_block(const TileOperand& a, const TileOperand& b, float* c, int64_t ldc, int64_t k,
                       bool accumulate) {
  if (accumulate) {
    _tile_loadd(0, c, ldc * 4);
    if constexpr (cols > 1) _tile_loadd(1, c + kTile, ldc * 4);
    if constexpr (rows > 1) _tile_loadd(2, c + kTile * ldc, ldc * 4);
    if constexpr (rows > 1 && cols > 1) _tile_loadd(3, c + kTile * ldc + kTile, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // The small planes first, so that their sum is not rounded away piece by piece.
  for (int sum = planes - 1; sum >= 0; --sum)
    for (int pa = 0; pa <= sum; ++pa)
      for (int64_t at = 0; at < k; at += kTile)
        tile_step<rows, cols>(a.words + pa * a.step + at, a.stride,
                              b.words + (sum - pa) * b.step + at * b.stride, b.stride);
  _tile_stored(0, c, ldc * 4);
  if constexpr (cols > 1) _tile_stored(1, c + kTile, ldc * 4);
  if constexpr (rows > 1) _tile_stored(2, c + kTile * ldc, ldc * 4);
  if constexpr (rows > 1 && cols > 1) _tile_stored(3, c + kTile * ldc + kTile, ldc * 4);
}

// C[m][n] (+)= A B; needs a TileSession.
template <int planes>
void multiply_tiles(const TileOperand& a, const TileOperand& b, float* c, int64_t ldc, int64_t m,
                    int64_t n, int64_t k, bool accumulate) {
  for (int64_t i = 0; i < m; i += 2 * kTile) {
    const TileOperand ai = {a.words + i * a.stride, a.stride, a.step};
    for (int64_t j = 0; j < n; j += 2 * kTile) {
      const TileOperand bj = {b.words + j, b.stride, b.step};
      float* cij = c + i * ldc + j;
      const bool tall = m - i > kTile, wide = n - j > kTile;
      if (tall && wide)
        tile_block<planes, 2, 2>(ai, bj, cij, ldc, k, accumulate);
      else if (tall)
        tile_block<planes, 2, 1>(ai, bj, cij, ldc, k, accumulate);
      else if (wide)
        tile_block<planes, 1, 2>(ai, bj, cij, ldc, k, accumulate);
      else
        tile_block<planes, 1, 1>(ai, bj, cij, ldc, k, accumulate);
    }
  }
}

// The bfloat16 of each plane of two vectors as pairs: words[p] holds `low` in the low halves and
// `high` in the high ones.
template <int planes>
inline void split_pairs(Vec low, Vec high, Vec words[planes]) {
  for (int p = 0; p < planes; ++p) {
    uint32_t packed[kLanes];
    store_bf16_pairs(packed, low, high);
    words[p] = load(reinterpret_cast<const float*>(packed));
    if (p + 1 < planes) {
      low = low - (Vec)(bits(words[p]) << 16);
      high = high - (Vec)(bits(words[p]) & static_cast<int32_t>(0xffff0000));
    }
  }
}

// 32 floats in a row to 16 words of each plane, `step` words apart.
template <int planes>
inline void store_split_row(Vec first, Vec second, uint32_t* out, int64_t step) {
  for (int p = 0; p < planes; ++p) {
    store_bf16(out + p * step, first, second);
    if (p + 1 == planes) break;
    const auto* halves = reinterpret_cast<const __m256i*>(out + p * step);
    auto widened = [](const __m256i* at) {
      return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(at)), 16);
    };
    first = first - widened(halves);
    second = second - widened(halves + 1);
  }
}

// out[i * stride + j] = rows[j], lane i.
inline void store_transposed(const Vec rows[16], uint32_t* out, int64_t stride) {
  __m512i t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int half = 0; half < 2; ++half) {
      u[i + 2 * half] = _mm512_unpacklo_epi64(t[i + half], t[i + 2 + half]);
      u[i + 2 * half + 1] = _mm512_unpackhi_epi64(t[i + half], t[i + 2 + half]);
    }
  // u[4 g + c] holds, in quarter q, column 4 q + c of rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(u[c], u[4 + c], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(u[c], u[4 + c], 0xee);
    const __m512i d = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x44);
    const __m512i e = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xee);
    _mm512_storeu_si512(out + c * stride, _mm512_shuffle_i32x4(a, d, 0x88));
    _mm512_storeu_si512(out + (4 + c) * stride, _mm512_shuffle_i32x4(a, d, 0xdd));
    _mm512_storeu_si512(out + (8 + c) * stride, _mm512_shuffle_i32x4(b, e, 0x88));
    _mm512_storeu_si512(out + (12 + c) * stride, _mm512_shuffle_i32x4(b, e, 0xdd));
  }
}

}  // namespace

#endif
