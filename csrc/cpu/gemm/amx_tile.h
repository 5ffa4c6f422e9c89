// GEMM building blocks on AMX tiles. A is [m][k] words in rows, B is [k][n] words in rows, where a
// word is a pair of bfloat16 that are neighbours along K, and C is [m][n] floats; m, n and k are
// multiples of 16, the side of a tile.
#pragma once

#if defined(__AMX_BF16__)

#include "../core/simd.h"

namespace {

constexpr int64_t kTile = 16;

// The compiler does not know that tile instructions access memory: no load or store moves across
// this.
inline void compiler_barrier(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

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
    compiler_barrier(&config);
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
};

// A tile by its number, which the instructions want as a literal.
template <int tile>
inline void store_tile(float* c, int64_t row) {
  static_assert(tile >= 0 && tile < 4);
  if constexpr (tile == 0) _tile_stored(0, c, row * 4);
  if constexpr (tile == 1) _tile_stored(1, c, row * 4);
  if constexpr (tile == 2) _tile_stored(2, c, row * 4);
  if constexpr (tile == 3) _tile_stored(3, c, row * 4);
}
template <int tile>
inline void load_tile(const float* c, int64_t row) {
  static_assert(tile >= 0 && tile < 4);
  if constexpr (tile == 0) _tile_loadd(0, c, row * 4);
  if constexpr (tile == 1) _tile_loadd(1, c, row * 4);
  if constexpr (tile == 2) _tile_loadd(2, c, row * 4);
  if constexpr (tile == 3) _tile_loadd(3, c, row * 4);
}
template <int tile>
inline void zero_tile() {
  static_assert(tile >= 0 && tile < 4);
  if constexpr (tile == 0) _tile_zero(0);
  if constexpr (tile == 1) _tile_zero(1);
  if constexpr (tile == 2) _tile_zero(2);
  if constexpr (tile == 3) _tile_zero(3);
}

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
struct BlockTarget {
  float* c;
  int64_t row;
  float* tile(int i) const { return c + i / 2 * kTile * row + i % 2 * kTile; }
};

// Stores tile `tile` to `last`, where there is one, and restarts it from `next` or from zeros.
template <int tile>
[[gnu::always_inline]] inline void restart_tile(const BlockTarget& last, const BlockTarget& next,
                                                bool accumulate) {
  if (last.c != nullptr) store_tile<tile>(last.tile(tile), last.row);
  if (accumulate)
    load_tile<tile>(next.tile(tile), next.row);
  else
    zero_tile<tile>();
}

// Stores a block of 2 x 2 tiles and starts the next one there with its first multiply, of tiles 4
// and 5 by 6 and 7. A store waits for the multiplies before it and delays only those of its own
// tile: in this order it costs no time.
[[gnu::always_inline]] inline void restart_block(const BlockTarget& last, const BlockTarget& next,
                                                 bool accumulate) {
  restart_tile<0>(last, next, accumulate);
  _tile_dpbf16ps(0, 4, 6);
  restart_tile<1>(last, next, accumulate);
  _tile_dpbf16ps(1, 4, 7);
  restart_tile<2>(last, next, accumulate);
  _tile_dpbf16ps(2, 5, 6);
  restart_tile<3>(last, next, accumulate);
  _tile_dpbf16ps(3, 5, 7);
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
