// Operands of attention's matmuls on AMX tiles, from rows of keys and queries. They lie in steps as
// in bf16x3_gemm.h, [step along K][part][half][16][16] words. Floats, and the weights of float16,
// are three bfloat16 parts; bfloat16 is one.
//
// Sums over K do not depend on its order, so words along a row join what is cheapest to join: of
// floats element i of a step with element i + 16, of bfloat16 neighbours as they lie. Both operands
// of a matmul keep to that. Words along the keys always join neighbours.
#pragma once

#include "../core/masked_load.h"
#include "../core/prefetch.h"
#include "../gemm/bf16x3_gemm.h"
#include "../gemm/pack.h"

#if defined(__AMX_BF16__)

namespace {

// The parts of sixteen floats, each a bfloat16 in the upper half of its lane.
struct Split {
  __m512i high, middle, low;
};

// The first part is rounded to nearest, ties away from zero, by adding half of the last bit that
// stays; of the rest, whose sign is no longer that of x, the upper bits are cut off. Not for floats
// that would round up to infinity. What is not finite gives parts whose sum is not finite, but not
// the same.
[[gnu::always_inline]] inline Split split(Vec x) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(-65536);
  const __m512i high = _mm512_and_si512(_mm512_add_epi32((__m512i)x, half), upper);
  x = x - (Vec)high;
  const __m512i middle = _mm512_and_si512((__m512i)x, upper);
  return {high, middle, (__m512i)(x - (Vec)middle)};
}

// Words of each part, their lower halves from `a`.
[[gnu::always_inline]] inline void store_words(const Split& a, const Split& b, uint32_t* out) {
  const auto join = [](__m512i x, __m512i y) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(x, 16), y);
  };
  _mm512_storeu_si512(out, join(a.high, b.high));
  _mm512_storeu_si512(out + kPartWords, join(a.middle, b.middle));
  _mm512_storeu_si512(out + 2 * kPartWords, join(a.low, b.low));
}

// Rows of one element type: how they are read, and how weights enter their matmuls.
struct FloatRows {
  using Scalar = float;
  static constexpr int kParts = 3;
  // Rows of a step of 32 that are joined along the queries: i and i + kApart.
  static constexpr int64_t kApart = kTile;

  static Vec load_some(const float* p, int64_t left) { return load_float32(p, left); }
};

struct HalfRows {
  using Scalar = uint16_t;
  static constexpr int kParts = 3;
  static constexpr int64_t kApart = kTile;

  static Vec load_some(const uint16_t* p, int64_t left) { return load_float16(p, left); }
};

struct BFloat16Rows {
  using Scalar = uint16_t;
  static constexpr int kParts = 1;
  static constexpr int64_t kApart = 1;

  static Vec load_some(const uint16_t* p, int64_t left) { return load_bfloat16(p, left); }
};

// Where two rows go: `low` and `high`, 16 words of every step of the width, `step` words apart; the
// words that join the rows, 16 for each half of those steps, `pairs_step` words apart.
struct RowTargets {
  uint32_t *low, *high;
  int64_t step;
  uint32_t* pairs;
  int64_t pairs_step;
};

// Two rows of `dim` elements; not `whole`, a null one is zeros and the last step may be shorter.
template <class Rows, bool rows, bool pairs, bool whole>
[[gnu::always_inline]] inline void place_rows(const typename Rows::Scalar* low,
                                              const typename Rows::Scalar* high, int64_t dim,
                                              RowTargets to) {
  for (int64_t d = 0; d < dim; d += kStepSide) {
    if constexpr (Rows::kParts == 3) {
      const auto piece = [&](const typename Rows::Scalar* row, int64_t at) {
        if constexpr (whole) return split(Rows::load_some(row + at, kLanes));
        return split(row == nullptr || at >= dim ? Vec{} : Rows::load_some(row + at, dim - at));
      };
      const Split a = piece(low, d), b = piece(low, d + kTile);
      const Split e = piece(high, d), f = piece(high, d + kTile);
      if constexpr (rows) store_words(a, b, to.low), store_words(e, f, to.high);
      if constexpr (pairs) store_words(a, e, to.pairs), store_words(b, f, to.pairs + kHalfWords);
    } else {
      const auto piece = [&](const uint16_t* row) {
        if constexpr (whole) return _mm512_loadu_si512(row + d);
        const int64_t left = dim - d;
        const __mmask32 mask = left >= kStepSide ? ~0u : (1u << left) - 1;
        return row == nullptr ? __m512i{} : _mm512_maskz_loadu_epi16(mask, row + d);
      };
      const auto join = [](__m256i x, __m256i y) {
        return _mm512_or_si512(_mm512_cvtepu16_epi32(x),
                               _mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16));
      };
      const __m512i a = piece(low), b = piece(high);
      if constexpr (rows) _mm512_storeu_si512(to.low, a), _mm512_storeu_si512(to.high, b);
      if constexpr (pairs) {
        _mm512_storeu_si512(to.pairs, join(_mm512_castsi512_si256(a), _mm512_castsi512_si256(b)));
        _mm512_storeu_si512(to.pairs + kHalfWords,
                            join(_mm512_extracti64x4_epi64(a, 1), _mm512_extracti64x4_epi64(b, 1)));
      }
    }
    if constexpr (rows) to.low += to.step, to.high += to.step;
    if constexpr (pairs) to.pairs += to.pairs_step;
  }
}

// Weights of two keys and 32 queries as operands: w[i][h] are those of key i and half h of the
// queries. Words along the queries go to rows and rows + kTile, words along the keys to pairs, and
// those of the second half to pairs + kHalfWords.
template <class Rows, bool with_rows, bool with_pairs>
[[gnu::always_inline]] inline void place_weights(const Vec w[2][2], uint32_t* rows,
                                                 uint32_t* pairs) {
  if constexpr (Rows::kParts == 3) {
    const Split a = split(w[0][0]), b = split(w[0][1]), e = split(w[1][0]), f = split(w[1][1]);
    if constexpr (with_rows) store_words(a, b, rows), store_words(e, f, rows + kTile);
    if constexpr (with_pairs) store_words(a, e, pairs), store_words(b, f, pairs + kHalfWords);
  } else {
    if constexpr (with_rows) {
      store_bf16(rows, w[0][0], w[0][1]);
      store_bf16(rows + kTile, w[1][0], w[1][1]);
    }
    if constexpr (with_pairs) {
      store_bf16_pairs(pairs, w[0][0], w[1][0]);
      store_bf16_pairs(pairs + kHalfWords, w[0][1], w[1][1]);
    }
  }
}

}  // namespace

#endif
