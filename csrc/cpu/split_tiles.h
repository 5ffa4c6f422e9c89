// Products of floats on AMX tiles. A float is the exact sum of three bfloat16: high, middle and low,
// each rounded to nearest. Of the nine products of such parts the six largest are added up; the rest
// is below 2^-25 of the product, half of what a float's rounding is. On a processor that adds bfloat16
// products at seventeen times the rate of floats this is twice as fast as its float units.
//
// Operands lie as steps of 32 along K: [step][part: high, middle, low][half][16][16] words. A word is a
// pair of bfloat16 that are neighbours along K, so a step holds 32 of K for 32 rows of A, half
// [row][word], or for 32 columns of B, half [word][column].
//
// Parts below 2^-126 count as zero: floats below 2^-110 lose their last bits, as those below 2^-126 lose
// all of theirs.
#pragma once

#include "gemm.h"
#include "tiles.h"

#if defined(__AMX_BF16__)

namespace {

constexpr int64_t kStepDepth = 2 * kTile;          // floats along K
constexpr int64_t kStepSide = 2 * kTile;           // rows of A or columns of B
constexpr int64_t kPartWords = kStepSide * kTile;  // of one part of a step
constexpr int64_t kHalfWords = kTile * kTile;
constexpr int64_t kStepWords = 3 * kPartWords;

struct Parts {
  __m512i high, middle, low;  // the upper halves of their lanes count, the lower ones are zero
};

// Where a vector has floats that are not finite or would round up to infinity: these stay whole in
// `high`, cut off instead of rounded.
[[gnu::noinline]] inline __m512i high_of_special(__m512i b) {
  const __m512i magnitude = _mm512_and_si512(b, _mm512_set1_epi32(0x7fffffff));
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
  const __mmask16 special = _mm512_cmpge_epi32_mask(magnitude, _mm512_set1_epi32(0x7f7f8000));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  __m512i high = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  high = _mm512_mask_mov_epi32(high, special, b);
  high = _mm512_mask_or_epi32(high, nan, high, _mm512_set1_epi32(0x00400000));
  return _mm512_and_si512(high, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
}

inline __m512i rounded_to_bf16(__m512i b) {
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_and_si512(sum, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
}

inline Parts split(Vec x) {
  const __m512i b = (__m512i)x;
  const __m512i magnitude = _mm512_and_si512(b, _mm512_set1_epi32(0x7fffffff));
  const __mmask16 special =
      _mm512_cmpge_epi32_mask(magnitude, _mm512_set1_epi32(0x7f7f8000));
  __m512i high = rounded_to_bf16(b);
  Vec rest = x - (Vec)high;
  if (__builtin_expect(special != 0, 0)) {
    high = high_of_special(b);
    const __mmask16 finite = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
    rest = (Vec)_mm512_maskz_sub_ps(finite, (__m512)x, (__m512)high);
  }
  const __m512i middle = rounded_to_bf16((__m512i)rest);
  return {high, middle, (__m512i)(rest - (Vec)middle)};
}

// 32 floats that are neighbours along K, as 16 words of each part at `out`.
inline void store_neighbours(Vec first, Vec second, uint32_t* out) {
  const __m512i upper = _mm512_set_epi16(
      63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19, 17,
      15, 13, 11, 9, 7, 5, 3, 1);
  const Parts a = split(first), b = split(second);
  const auto put = [&](__m512i low, __m512i high, uint32_t* to) {
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(low, upper, high));
  };
  put(a.high, b.high, out);
  put(a.middle, b.middle, out + kPartWords);
  put(a.low, b.low, out + 2 * kPartWords);
}

// 16 pairs of floats, the first of each pair from `even`, as 16 words of each part at `out`.
inline void store_pairs(Vec even, Vec odd, uint32_t* out) {
  const Parts a = split(even), b = split(odd);
  const auto put = [](__m512i low, __m512i high, uint32_t* to) {
    _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(low, 16), high));
  };
  put(a.high, b.high, out);
  put(a.middle, b.middle, out + kPartWords);
  put(a.low, b.low, out + 2 * kPartWords);
}

// Transposes one half of a step in place, each of its parts.
inline void transpose_half(uint32_t* half) {
  for (int part = 0; part < 3; ++part) {
    uint32_t* tile = half + part * kPartWords;
    Vec rows[kTile];
    FASTVLP_UNROLL
    for (int i = 0; i < kTile; ++i) rows[i] = load(reinterpret_cast<const float*>(tile + i * kTile));
    store_transposed(rows, tile, kTile);
  }
}

// C, up to 2 x 2 tiles, = `steps` steps of A B, on top of what the four tiles of C hold.
template <int rows, int cols>
inline void add_split_steps(const uint32_t* a, const uint32_t* b, int64_t steps) {
  const auto load_a = [&](int part) {
    _tile_loadd(4, a + part * kPartWords, 64);
    if constexpr (rows > 1) _tile_loadd(5, a + part * kPartWords + kHalfWords, 64);
  };
  const auto load_b = [&](int part) {
    _tile_loadd(6, b + part * kPartWords, 64);
    if constexpr (cols > 1) _tile_loadd(7, b + part * kPartWords + kHalfWords, 64);
  };
  const auto add = [] {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (cols > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (rows > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (rows > 1 && cols > 1) _tile_dpbf16ps(3, 5, 7);
  };
  for (int64_t s = 0; s < steps; ++s, a += kStepWords, b += kStepWords) {
    load_a(2), load_b(0), add();
    load_a(1), add();
    load_b(1), add();
    load_a(0), add();
    load_b(2), add();
    load_b(0), add();
  }
}

}  // namespace

#endif
