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

// Adds the product of tiles 4 and 5, rows of A, and 6 and 7, columns of B, to tiles 0 to 3.
template <int rows, int cols>
inline void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (cols > 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (rows > 1) _tile_dpbf16ps(2, 5, 6);
  if constexpr (rows > 1 && cols > 1) _tile_dpbf16ps(3, 5, 7);
}

// Where the results of a block of 2 x 2 tiles go, in rows `row` floats apart.
struct BlockPlace {
  float* c;
  int64_t row;
};

// A block of 2 x 2 leaves tiles 0 to 3 for `last`, where there is one, and the next one begins there,
// from `next` or zeros, with its first product, of tiles 4 and 5 by 6 and 7. A store waits for the
// products before it and holds up those of its tile alone: so done, it costs no time.
inline void turn_block(const BlockPlace& last, const BlockPlace& next, bool accumulate) {
  const int64_t down = kTile * last.row;
  if (last.c != nullptr) {
    _tile_stored(0, last.c, last.row * 4);
    if (accumulate)
      _tile_loadd(0, next.c, next.row * 4);
    else
      _tile_zero(0);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stored(1, last.c + kTile, last.row * 4);
    if (accumulate)
      _tile_loadd(1, next.c + kTile, next.row * 4);
    else
      _tile_zero(1);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stored(2, last.c + down, last.row * 4);
    if (accumulate)
      _tile_loadd(2, next.c + kTile * next.row, next.row * 4);
    else
      _tile_zero(2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_stored(3, last.c + down + kTile, last.row * 4);
    if (accumulate)
      _tile_loadd(3, next.c + kTile * next.row + kTile, next.row * 4);
    else
      _tile_zero(3);
    _tile_dpbf16ps(3, 5, 7);
    return;
  }
  start_block<2, 2>(next.c, next.row, accumulate);
  multiply_tiles<2, 2>();
}

// One step along K for a block of rows x cols tiles of C.
template <int rows, int cols>
inline void tile_step(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb) {
  _tile_loadd(4, a, lda * 4);
  if constexpr (rows > 1) _tile_loadd(5, a + kTile * lda, lda * 4);
  _tile_loadd(6, b, ldb * 4);
  if constexpr (cols > 1) _tile_loadd(7, b + kTile, ldb * 4);
  multiply_tiles<rows, cols>();
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
