// GEMM of float32 on AMX tiles by bf16x3 emulation. A float is the exact sum of three bfloat16:
// high, middle and low, each rounded to nearest. Of the nine partial products of two such sums the
// six largest are accumulated; the rest is below 2^-25 of the product, half of a float's rounding.
// Where tiles multiply bfloat16 at seventeen times the rate of float FMAs, this is faster than
// those.
//
// Operands lie as steps of 32 along K: [step][part: high, middle, low][half][16][16] words. A word
// is a pair of bfloat16 that are neighbours along K, so a step holds 32 of K for 32 rows of A, half
// [row][word], or for 32 columns of B, half [word][column].
//
// Parts below 2^-126 count as zero: floats below 2^-110 lose their last bits, and those below
// 2^-126 all of them.
#pragma once

#include "amx_tile.h"
#include "simd_gemm.h"

#if defined(__AMX_BF16__)

namespace {

constexpr int64_t kStepDepth = 2 * kTile;          // floats along K
constexpr int64_t kStepSide = 2 * kTile;           // rows of A or columns of B
constexpr int64_t kPartWords = kStepSide * kTile;  // of one part of a step
constexpr int64_t kHalfWords = kTile * kTile;
constexpr int64_t kStepWords = 3 * kPartWords;

inline __m512i words_of(__m512bh x) { return (__m512i)x; }

// Whether a float of these is not finite or would round up to infinity.
inline bool has_special(Vec a, Vec b) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), least = _mm512_set1_epi32(0x7f7f8000);
  const __m512i larger = _mm512_max_epu32(_mm512_and_si512((__m512i)a, magnitude),
                                          _mm512_and_si512((__m512i)b, magnitude));
  return _mm512_cmpge_epu32_mask(larger, least) != 0;
}

// The high part of floats among which special ones may be, in the upper half of each lane, and what
// is left of them: the special ones are cut off instead of rounded, and nothing is left of those
// that are not finite.
[[gnu::noinline]] inline __m512i high_of_special(Vec x, Vec* rest) {
  const __m512i b = (__m512i)x, upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512i magnitude = _mm512_and_si512(b, _mm512_set1_epi32(0x7fffffff));
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
  const __mmask16 finite = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
  const __mmask16 special = _mm512_cmpge_epi32_mask(magnitude, _mm512_set1_epi32(0x7f7f8000));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  __m512i high = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  high = _mm512_mask_mov_epi32(high, special, b);
  high = _mm512_mask_or_epi32(high, nan, high, _mm512_set1_epi32(0x00400000));
  high = _mm512_and_si512(high, upper);
  *rest = (Vec)_mm512_maskz_sub_ps(finite, (__m512)x, (__m512)high);
  return high;
}

// Layouts of two vectors of bfloat16 in one: one after the other, or alternating.
struct Neighbours {
  static __m512i round(Vec a, Vec b) { return words_of(_mm512_cvtne2ps_pbh((__m512)b, (__m512)a)); }
  static Vec first(__m512i words) {
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(words)), 16);
  }
  static Vec second(__m512i words) {
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1)), 16);
  }
};
struct Pairs {
  static __m512i round(Vec a, Vec b) { return (__m512i)bf16_pairs(a, b); }
  static Vec first(__m512i words) { return (Vec)_mm512_slli_epi32(words, 16); }
  static Vec second(__m512i words) {
    return (Vec)_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  }
};

// The three parts of 32 floats as 16 words each, kPartWords apart.
template <class Layout>
inline void store_parts(Vec a, Vec b, uint32_t* out) {
  __m512i high;
  if (__builtin_expect(has_special(a, b), 0)) {
    Vec a_rest, b_rest;
    const Vec a_high = (Vec)high_of_special(a, &a_rest), b_high = (Vec)high_of_special(b, &b_rest);
    high = Layout::round(a_high, b_high);  // exact
    a = a_rest;
    b = b_rest;
  } else {
    high = Layout::round(a, b);
    a = a - Layout::first(high);
    b = b - Layout::second(high);
  }
  const __m512i middle = Layout::round(a, b);
  _mm512_storeu_si512(out, high);
  _mm512_storeu_si512(out + kPartWords, middle);
  _mm512_storeu_si512(out + 2 * kPartWords,
                      Layout::round(a - Layout::first(middle), b - Layout::second(middle)));
}

// 32 floats that are neighbours along K, as 16 words of each part at `out`.
inline void store_neighbours(Vec first, Vec second, uint32_t* out) {
  store_parts<Neighbours>(first, second, out);
}

// 16 pairs of floats, the first of each pair from `even`, as 16 words of each part at `out`.
inline void store_pairs(Vec even, Vec odd, uint32_t* out) { store_parts<Pairs>(even, odd, out); }

// Transposes 16 x 16 words, in place or not.
inline void transpose_tile(const uint32_t* tile, uint32_t* out) {
  Vec rows[kTile];
  FASTVLP_UNROLL
  for (int i = 0; i < kTile; ++i) rows[i] = load(reinterpret_cast<const float*>(tile + i * kTile));
  store_transposed(rows, out, kTile);
}
inline void transpose_tile(uint32_t* tile) { transpose_tile(tile, tile); }

// Transposes one half of a step in place, each of its parts.
inline void transpose_half(uint32_t* half) {
  for (int part = 0; part < 3; ++part) transpose_tile(half + part * kPartWords);
}

// C, up to 2 x 2 tiles, = `steps` steps of A B, on top of what the four tiles of C hold after
// first(), which multiplies tiles 4 and 5 by 6 and 7. `between` is called after every product of
// parts.
template <int rows, int cols, class First, class Between>
inline void add_split_steps(const uint32_t* a, const uint32_t* b, int64_t steps, const First& first,
                            Between& between) {
  const auto load_a = [&](int part) {
    _tile_loadd(4, a + part * kPartWords, 64);
    if constexpr (rows > 1) _tile_loadd(5, a + part * kPartWords + kHalfWords, 64);
  };
  const auto load_b = [&](int part) {
    _tile_loadd(6, b + part * kPartWords, 64);
    if constexpr (cols > 1) _tile_loadd(7, b + part * kPartWords + kHalfWords, 64);
  };
  const auto add = [&] {
    multiply_tiles<rows, cols>();
    between();
  };
  for (int64_t s = 0; s < steps; ++s, a += kStepWords, b += kStepWords) {
    load_a(2), load_b(0);
    if (s == 0)
      first(), between();
    else
      add();
    load_a(1), add();
    load_b(1), add();
    load_a(0), add();
    load_b(2), add();
    load_b(0), add();
  }
}

constexpr auto nothing_between = [] {};

// A block of C, up to 32 x 32, in rows `c_row` floats apart. Its rows start as `bias`, or as zeros
// where that is null. Needs a TileSession.
template <int rows, int cols>
inline void split_block(const uint32_t* a, const uint32_t* b, int64_t steps, const float* bias,
                        float* c, int64_t c_row) {
  if (bias == nullptr) {
    start_block<rows, cols>(nullptr, 0, false);
  } else {
    _tile_loadd(0, bias, 0);
    if constexpr (cols > 1) _tile_loadd(1, bias + kTile, 0);
    if constexpr (rows > 1) _tile_loadd(2, bias, 0);
    if constexpr (rows > 1 && cols > 1) _tile_loadd(3, bias + kTile, 0);
  }
  add_split_steps<rows, cols>(a, b, steps, multiply_tiles<rows, cols>, nothing_between);
  store_block<rows, cols>(c, c_row);
}

}  // namespace

#endif
