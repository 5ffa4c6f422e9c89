// Packs rows of features, or of a matrix, as operands of bf16x3_gemm.h, and multiplies a group of
// rows. Features are scaled by a power of two that brings the largest of a block near 1: all of its
// floats then keep all bits that matter relative to that one, however small they are.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../core/masked_load.h"
#include "amx_gemm.h"
#include "bf16x3_gemm.h"
#include "pack.h"

#if defined(__AMX_BF16__)

namespace {

// Rows of A that are multiplied together: 128 of a depth of 512 leave room in L2
// for the panel of B that all of them use and the next one.
constexpr int64_t kSplitGroup = 128;

// At least one: a matmul of depth 0 is a step of zeros.
inline int64_t steps_of(int64_t depth) {
  return depth == 0 ? 1 : round_up(depth, kStepDepth) / kStepDepth;
}

inline int64_t split_words(int64_t side, int64_t depth) {
  return round_up(side, kStepSide) / kStepSide * steps_of(depth) * kStepWords;
}

// The power of two that brings `magnitude` near 2^exponent; 1 for zero, infinity and NaN.
inline float factor_to(float magnitude, int exponent) {
  if (!(magnitude > 0.0f) || !std::isfinite(magnitude)) return 1.0f;
  return std::ldexp(1.0f, std::clamp(exponent - std::ilogb(magnitude), -126, 126));
}

// numerator / (f * g), finite even where no float is.
inline float quotient(double numerator, float f, float g) {
  const double most = std::numeric_limits<float>::max();
  const double value = numerator / f / g;
  return static_cast<float>(value > most ? most : value < -most ? -most : value);
}

// One row of features, sixteen elements at a time as floats: zeros from element `count` on.
template <Element element>
struct FeatureRow {
  const char* data;
  int64_t count;

  Vec load_at(int64_t d) const { return elements(d, std::max<int64_t>(count - d, 0)); }
  // The same where the row has all sixteen.
  Vec load_whole(int64_t d) const { return elements(d); }

 private:
  template <class... Count>
  Vec elements(int64_t d, Count... n) const {
    const char* at = data + d * bytes_of(element);
    if constexpr (element == Element::kFloat32)
      return load_float32(reinterpret_cast<const float*>(at), n...);
    else if constexpr (element == Element::kBFloat16)
      return load_bfloat16(reinterpret_cast<const uint16_t*>(at), n...);
    else
      return load_float16(reinterpret_cast<const uint16_t*>(at), n...);
  }
};

// Rows [begin, begin + count) of `dim` elements; the rows after them are zeros.
template <Element element>
struct FeatureRows {
  const Features& m;
  int64_t begin, count, dim;

  FeatureRow<element> operator[](int64_t r) const {
    return r < count ? existing(r) : FeatureRow<element>{static_cast<const char*>(m.data), 0};
  }
  FeatureRow<element> existing(int64_t r) const {
    return {static_cast<const char*>(m.data) + (begin + r) * m.stride * bytes_of(element), dim};
  }
};

// Calls function(rows) with the FeatureRows of m's element type.
template <class Function>
inline void with_rows(const Features& m, int64_t begin, int64_t count, int64_t dim,
                      const Function& function) {
  if (m.element == Element::kFloat32)
    function(FeatureRows<Element::kFloat32>{m, begin, count, dim});
  else if (m.element == Element::kBFloat16)
    function(FeatureRows<Element::kBFloat16>{m, begin, count, dim});
  else
    function(FeatureRows<Element::kFloat16>{m, begin, count, dim});
}

// The largest of rows [begin, begin + count). That of 16-bit floats does not matter: they are never
// small enough to need a factor.
inline float largest_magnitude(const Features& m, int64_t begin, int64_t count, int64_t dim) {
  if (m.element != Element::kFloat32) return 1.0f;
  const FeatureRows<Element::kFloat32> rows = {m, begin, count, dim};
  VecI largest = {};
  const auto include = [&](Vec v) {
    const VecI magnitude = bits(absolute(v));
    largest = magnitude > largest ? magnitude : largest;
  };
  for (int64_t r = 0; r < count; ++r) {
    const auto row = rows.existing(r);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) include(row.load_whole(d));
    if (d < dim) include(row.load_at(d));
  }
  const int32_t most = _mm512_reduce_max_epi32((__m512i)largest);
  return bits_to_float(static_cast<uint32_t>(most));
}

inline float factor_of_rows(const Features& m, int64_t begin, int64_t count, int64_t dim) {
  return factor_to(largest_magnitude(m, begin, count, dim), 0);
}

// Which operand of a matmul is packed: halves of its steps are [row][word] for A and [word][column]
// for B.
enum class Operand { kA, kB };

// Rows [begin, begin + count) times `factor`, zero up to a multiple of 32, as an operand of a matmul
// along dim.
inline void split_along_dim(Operand operand, const Features& m, int64_t begin, int64_t count,
                            int64_t dim, float factor, uint32_t* out) {
  const int64_t steps = steps_of(dim);
  with_rows(m, begin, count, dim, [&](const auto& rows) {
    for (int64_t r = 0; r < round_up(count, kStepSide); ++r) {
      uint32_t* at = out + r / kStepSide * steps * kStepWords + r % kStepSide * kTile;
      const auto row = rows[r];
      int64_t d = 0;
      for (; d + kStepDepth <= row.count; d += kStepDepth, at += kStepWords)
        store_neighbours(row.load_whole(d) * factor, row.load_whole(d + kLanes) * factor, at);
      for (; d < steps * kStepDepth; d += kStepDepth, at += kStepWords)
        store_neighbours(row.load_at(d) * factor, row.load_at(d + kLanes) * factor, at);
    }
  });
  if (operand == Operand::kA) return;
  for (int64_t s = 0; s < split_words(count, dim) / kStepWords; ++s, out += kStepWords) {
    transpose_half(out);
    transpose_half(out + kHalfWords);
  }
}

// The same of a matmul along the rows.
inline void split_along_rows(Operand operand, const Features& m, int64_t begin, int64_t count,
                             int64_t dim, float factor, uint32_t* out) {
  const int64_t steps = steps_of(count);
  with_rows(m, begin, count, dim, [&](const auto& rows) {
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t d = 0; d < round_up(dim, kStepSide); d += kTile) {
        uint32_t* half =
            out + (d / kStepSide * steps + s) * kStepWords + d % kStepSide / kTile * kHalfWords;
        const auto pack = [&](auto load_row) {
          for (int64_t w = 0; w < kTile; ++w)
            store_pairs(load_row(s * kStepDepth + 2 * w) * factor,
                        load_row(s * kStepDepth + 2 * w + 1) * factor, half + w * kTile);
        };
        if ((s + 1) * kStepDepth <= count && d + kTile <= dim)
          pack([&](int64_t k) { return rows.existing(k).load_whole(d); });
        else
          pack([&](int64_t k) { return rows[k].load_at(d); });
        if (operand == Operand::kA) transpose_half(half);
      }
  });
}

// Step `step` of `steps` of the A operand whose columns along K are rows of `columns`: 32 of them,
// `stride` apart, `m` long, a multiple of 16. `rows` is scratch for 16 rows of the step.
inline void split_transposed_step(const float* columns, int64_t stride, int64_t m, float factor,
                                  int64_t step, int64_t steps, uint32_t* a, float* rows) {
  for (int64_t i = 0; i < m; i += kTile) {
    transpose_words(reinterpret_cast<const uint32_t*>(columns + i), stride, kStepDepth, kTile,
                    reinterpret_cast<uint32_t*>(rows), kStepDepth);
    uint32_t* out =
        a + (i / kStepSide * steps + step) * kStepWords + i % kStepSide / kTile * kHalfWords;
    for (int64_t r = 0; r < kTile; ++r) {
      const float* row = rows + r * kStepDepth;
      store_neighbours(load(row) * factor, load(row + kLanes) * factor, out + r * kTile);
    }
  }
}

// C[m][32 panels] = alpha A B (+ C when accumulate); needs a TileSession and 1,024 floats in
// `block`.
inline void multiply_split(const uint32_t* a, const uint32_t* b, int64_t steps, float* c,
                           int64_t ldc, int64_t m, int64_t panels, float alpha, bool accumulate,
                           float* block) {
  compiler_barrier(a);
  for (int64_t p = 0; p < panels; ++p, b += steps * kStepWords)
    for (int64_t i = 0; i < m; i += kStepSide) {
      split_block<2, 2>(a + i / kStepSide * steps * kStepWords, b, steps, nullptr, block,
                        kStepSide);
      compiler_barrier(block);
      float* out = c + i * ldc + p * kStepSide;
      for (int64_t r = 0; r < kStepSide; ++r, out += ldc)
        for (int64_t j = 0; j < kStepSide; j += kLanes) {
          const Vec v = load(block + r * kStepSide + j) * alpha;
          store(out + j, accumulate ? load(out + j) + v : v);
        }
    }
}

}  // namespace

#endif
