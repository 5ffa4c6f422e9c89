// Copies feature rows into the layouts that simd_gemm.h reads, converting the element type on the
// way.
#pragma once

#include "../core/convert.h"
#include "../core/matrix_view.h"
#include "simd_gemm.h"

namespace {

using fastvlp::Element;
using fastvlp::Features;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline void convert_row(const Features& m, int64_t row, int64_t dim, float* out) {
  const int64_t bytes = bytes_of(m.element);
  to_floats(static_cast<const char*>(m.data) + row * m.stride * bytes, m.element, dim, out);
}

// Writes n floats as elements [at, at + n) of `out`, rounded to nearest even.
inline void store_row(const float* in, int64_t n, Element element, void* out, int64_t at) {
  const int64_t bytes = bytes_of(element);
  from_floats(in, n, element, static_cast<char*>(out) + at * bytes);
}

template <class Dot>
int64_t depth_words(int64_t n) {
  return (n + Dot::kPerWord - 1) / Dot::kPerWord;
}

// One feature row as words along dim, the last one padded with zero.
template <class Dot>
void word_row(const Features& m, int64_t row, int64_t dim, uint32_t* out) {
  if constexpr (Dot::kPerWord == 1) {
    convert_row(m, row, dim, reinterpret_cast<float*>(out));
  } else {
    if (dim % 2) out[dim / 2] = 0;
    std::memcpy(out, static_cast<const uint16_t*>(m.data) + row * m.stride, dim * 2);
  }
}

// The rows as an unpacked A operand of a matmul along dim, read where they lie, if their layout
// allows it and they are a multiple of `grain` rows; else null.
template <class Dot>
const uint32_t* unpacked_rows(const Features& m, int64_t begin, int64_t count, int64_t dim,
                              int64_t grain = kRegisterRows) {
  constexpr Element element = Dot::kPerWord == 1 ? Element::kFloat32 : Element::kBFloat16;
  const bool whole = dim % Dot::kPerWord == 0 && m.stride % Dot::kPerWord == 0;
  const uintptr_t at = reinterpret_cast<uintptr_t>(m.data);
  if (m.element != element || !whole || at % 4 != 0 || count % grain != 0) return nullptr;
  return static_cast<const uint32_t*>(m.data) + begin * (m.stride / Dot::kPerWord);
}

// Rows [begin, begin + count) as the A operand of a matmul along dim: [count rounded up to
// `grain`][stride].
template <class Dot>
void copy_rows(const Features& m, int64_t begin, int64_t count, int64_t dim, uint32_t* out,
               int64_t stride, int64_t grain) {
  for (int64_t r = 0; r < count; ++r) word_row<Dot>(m, begin + r, dim, out + r * stride);
  for (int64_t r = count; r < round_up(count, grain); ++r)
    std::memset(out + r * stride, 0, depth_words<Dot>(dim) * 4);
}

// Rows [begin, begin + count) as the B operand of a matmul along dim: panels of
// [words of dim][kPanel rows]. `row` is scratch for one word row.
template <class Dot>
void pack_transposed(const Features& m, int64_t begin, int64_t count, int64_t dim, float* out,
                     uint32_t* row) {
  const int64_t words = depth_words<Dot>(dim);
  for (int64_t r = 0; r < round_up(count, kPanel); ++r) {
    float* column = out + r / kPanel * words * kPanel + r % kPanel;
    if (r < count)
      word_row<Dot>(m, begin + r, dim, row);
    else
      std::memset(row, 0, words * 4);
    for (int64_t k = 0; k < words; ++k) std::memcpy(column + k * kPanel, row + k, 4);
  }
}

// Rows [begin, begin + count) as the B operand of a matmul along the rows: panels of
// [words of rows][kPanel of dim]. `row` is scratch for two padded float rows.
template <class Dot>
void pack_along_rows(const Features& m, int64_t begin, int64_t count, int64_t dim, float* out,
                     float* row) {
  const int64_t padded = round_up(dim, kPanel);
  const int64_t words = depth_words<Dot>(count);
  for (int64_t k = 0; k < words; ++k) {
    if constexpr (Dot::kPerWord == 1) {
      std::memset(row + dim, 0, (padded - dim) * 4);
      convert_row(m, begin + k, dim, row);
      for (int64_t p = 0; p < padded / kPanel; ++p)
        std::memcpy(out + (p * words + k) * kPanel, row + p * kPanel, kPanel * 4);
    } else {
      const uint16_t* first = static_cast<const uint16_t*>(m.data) + (begin + 2 * k) * m.stride;
      const bool pair = 2 * k + 1 < count;
      const uint16_t* second = pair ? first + m.stride : first;
      const uint32_t keep = pair ? 0xffffu : 0u;
      uint32_t* words_out = reinterpret_cast<uint32_t*>(row);
      for (int64_t d = 0; d < dim; ++d) words_out[d] = first[d] | (second[d] & keep) << 16;
      std::memset(row + dim, 0, (padded - dim) * 4);
      for (int64_t p = 0; p < padded / kPanel; ++p)
        std::memcpy(out + (p * words + k) * kPanel, row + p * kPanel, kPanel * 4);
    }
  }
}

}  // namespace
