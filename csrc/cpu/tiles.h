// Products on AMX tiles. A is [m][k] words in rows, B is [k][n] words in rows, where a word is a
// pair of bfloat16 that are neighbours along K, and C is [m][n] floats; m, n and k are multiples of
// 16, the side of a tile.
#pragma once

#if defined(__AMX_BF16__)

#include "simd.h"

namespace {

constexpr int64_t kTile = 16;

// The compiler does not know that tile instructions read memory: all of it is up to date from here.
inline void publish(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

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
    publish(&config);
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
};

struct TileOperand {
  const uint32_t* words;
  int64_t stride;  // words from one row to the next
};

// The block of C that tiles 0 to 3 hold, rows x cols of them, from C or as zeros.
template <int rows, int cols>
inline void start_block(const float* c, int64_t ldc, bool accumulate) {
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
}

template <int rows, int cols>
inline void store_block(float* c, int64_t ldc) {
  _tile_stored(0, c, ldc * 4);
  if constexpr (cols > 1) _tile_stored(1, c + kTile, ldc * 4);
  if constexpr (rows > 1) _tile_stored(2, c + kTile * ldc, ldc * 4);
  if constexpr (rows > 1 && cols > 1) _tile_stored(3, c + kTile * ldc + kTile, ldc * 4);
}

// One step along K for a block of rows x cols tiles of C.
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

template <int rows, int cols>
inline void tile_block(const TileOperand& a, const TileOperand& b, float* c, int64_t ldc, int64_t k,
                       bool accumulate) {
  start_block<rows, cols>(c, ldc, accumulate);
  for (int64_t at = 0; at < k; at += kTile)
    tile_step<rows, cols>(a.words + at, a.stride, b.words + at * b.stride, b.stride);
  store_block<rows, cols>(c, ldc);
}

}  // namespace

#endif
