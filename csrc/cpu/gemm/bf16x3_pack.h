// Packs rows of features as operands of bf16x3_gemm.h, and multiplies a group of rows. Features are
// scaled by a power of two that brings the largest of a block near 1: all of its floats then keep
// all bits that matter relative to that one, however small they are.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "amx_gemm.h"
#include "bf16x3_gemm.h"
#include "pack.h"

#if defined(__AMX_BF16__)

namespace {

// Rows of A that are multiplied together: 128 of a depth of 512 leave room in L2
// for the panel of B that all of them use and the next one.
constexpr int64_t kSplitGroup = 128;

inline int64_t steps_of(int64_t depth) { return round_up(depth, kStepDepth) / kStepDepth; }

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

// A row of features as floats, zero up to whole steps; in place where it can be, else in `copy`.
inline const float* padded_row(const Features& m, int64_t row, int64_t dim, float* copy) {
  if (m.element == Element::kFloat32 && dim % kStepDepth == 0)
    return static_cast<const float*>(m.data) + row * m.stride;
  convert_row(m, row, dim, copy);
  std::memset(copy + dim, 0, (round_up(dim, kStepDepth) - dim) * 4);
  return copy;
}

// The largest of rows [begin, begin + count). That of 16-bit floats does not matter: they are never
// small enough to need a factor.
inline float largest_magnitude(const Features& m, int64_t begin, int64_t count, int64_t dim,
                               float* copy) {
  if (m.element != Element::kFloat32) return 1.0f;
  VecI largest = {};
  for (int64_t r = 0; r < count; ++r) {
    const float* row = padded_row(m, begin + r, dim, copy);
    for (int64_t d = 0; d < dim; d += kLanes) {
      const VecI magnitude = bits(absolute(load(row + d)));
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  const int32_t most = _mm512_reduce_max_epi32((__m512i)largest);
  return bits_to_float(static_cast<uint32_t>(most));
}

inline float factor_of_rows(const Features& m, int64_t begin, int64_t count, int64_t dim,
                            float* copy) {
  return factor_to(largest_magnitude(m, begin, count, dim, copy), 0);
}

// Rows [begin, begin + count) times `factor`, zero up to a multiple of 32, as the A operand of a
// matmul along dim.
inline void split_rows(const Features& m, int64_t begin, int64_t count, int64_t dim, float factor,
                       uint32_t* out, float* copy) {
  const int64_t steps = steps_of(dim);
  for (int64_t r = 0; r < round_up(count, kStepSide); ++r) {
    uint32_t* at = out + r / kStepSide * steps * kStepWords + r % kStepSide * kTile;
    const float* row = r < count ? padded_row(m, begin + r, dim, copy) : nullptr;
    for (int64_t s = 0; s < steps; ++s, at += kStepWords) {
      const float* in = row + s * kStepDepth;
      if (row == nullptr)
        store_neighbours(Vec{}, Vec{}, at);
      else
        store_neighbours(load(in) * factor, load(in + kLanes) * factor, at);
    }
  }
}

// The same as the B operand, a column for each row.
inline void split_columns(const Features& m, int64_t begin, int64_t count, int64_t dim,
                          float factor, uint32_t* out, float* copy) {
  split_rows(m, begin, count, dim, factor, out, copy);
  for (int64_t s = 0; s < split_words(count, dim) / kStepWords; ++s, out += kStepWords) {
    transpose_half(out);
    transpose_half(out + kHalfWords);
  }
}

// The same as the B operand of a matmul along the rows. `copies` has room for two rows.
inline void split_along_rows(const Features& m, int64_t begin, int64_t count, int64_t dim,
                             float factor, uint32_t* out, float* copies) {
  const int64_t padded = round_up(dim, kStepSide), steps = steps_of(count);
  for (int64_t k = 0; k < steps * kTile; ++k) {
    const auto row = [&](int64_t r, float* copy) {
      return r < count ? padded_row(m, begin + r, dim, copy) : nullptr;
    };
    const float* even = row(2 * k, copies);
    const float* odd = row(2 * k + 1, copies + padded);
    for (int64_t d = 0; d < padded; d += kLanes)
      store_pairs(even ? load(even + d) * factor : Vec{}, odd ? load(odd + d) * factor : Vec{},
                  out + (d / kStepSide * steps + k / kTile) * kStepWords +
                      d % kStepSide / kTile * kHalfWords + k % kTile * kTile);
  }
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
