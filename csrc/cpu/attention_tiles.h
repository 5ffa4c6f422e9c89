// The products of attention on AMX tiles, for bfloat16; see attention_products.h for what a Products
// class is.
#pragma once

#include "attention_products.h"
#include "tiles.h"

#if defined(__AMX_BF16__)

namespace {

struct TileProducts {
  static constexpr int64_t kQueryBlock = 128;
  static constexpr int64_t kKeyBlock = 64;
  static constexpr bool kWeightsInPlace = false;
  static constexpr bool kQueriesTransposed = false;

  const int64_t dim;
  const TileSession session;
  mutable Ahead ahead;  // advances with the products
  explicit TileProducts(int64_t d) : dim(d) {}

  int64_t padded_keys(int64_t n) const { return round_up(n, kTile); }
  int64_t padded_queries(int64_t m) const { return round_up(m, 2 * kTile); }
  int64_t padded_dim() const { return round_up(dim, kTile); }
  int64_t dim_words() const { return pair_words(dim); }
  static int64_t pair_words(int64_t n) { return round_up((n + 1) / 2, kTile); }

  // What a product calls between its blocks.
  auto step() const {
    return [this](int64_t words) { ahead.step(words * 2); };
  }

  int64_t row_words() const { return kTile * padded_dim(); }
  int64_t key_rows_words(int64_t n) const { return n * dim_words(); }
  int64_t key_columns_words(int64_t n) const { return pair_words(n) * padded_dim(); }
  int64_t query_columns_words(int64_t m) const { return dim_words() * m; }
  int64_t query_rows_words(int64_t m) const { return m / 2 * padded_dim(); }
  int64_t key_weights_words(int64_t n, int64_t m) const { return n * (m / 2); }
  int64_t query_weights_words(int64_t n, int64_t m) const { return m * pair_words(n); }
  int64_t into_queries_floats(int64_t m) const { return m * padded_dim(); }

  // In place where tiles can be read from there, but for a tail in `out`; else packed there.
  KeyRows key_rows(const SeenRows& x, uint32_t* out) const {
    const bool in_place = x.seen == nullptr && dim % (2 * kTile) == 0 &&
                          x.features.stride % 2 == 0 &&
                          reinterpret_cast<uintptr_t>(x.features.data) % 4 == 0;
    const int64_t begin = in_place ? x.count / kTile * kTile : 0, end = padded_keys(x.count);
    for (int64_t r = begin; r < end; ++r) {
      prefetch_row<3>(x, r + kPrefetchRows, dim);
      pack_row(x.features, r < x.count ? x[r] : -1, out + (r - begin) * dim_words());
    }
    if (!in_place) return {out, dim_words(), end, nullptr};
    return {static_cast<const uint32_t*>(x.features.data), x.features.stride / 2, begin, out};
  }

  KeyRows key_columns(const SeenRows& x, uint32_t* out) const {
    for (int64_t w = 0; w < pair_words(x.count); ++w) {
      prefetch_row<3>(x, 2 * w + kPrefetchRows, dim);
      prefetch_row<3>(x, 2 * w + 1 + kPrefetchRows, dim);
      pack_pair(x.features, 2 * w < x.count ? x[2 * w] : -1,
                2 * w + 1 < x.count ? x[2 * w + 1] : -1, out + w * padded_dim());
    }
    return {out, padded_dim(), pair_words(x.count), nullptr};
  }

  void pack_query_columns(const Features& y, int64_t begin, int64_t count, bool negate,
                          uint32_t* out, uint32_t* row) const {
    const int64_t m = padded_queries(count), words = dim_words();
    const uint32_t sign = negate ? 0x80008000u : 0u;
    for (int64_t r = 0; r < m; r += kTile) {
      // Sixteen rows of words, transposed a tile at a time.
      for (int64_t i = 0; i < kTile; ++i)
        pack_row(y, r + i < count ? begin + r + i : -1, row + i * words);
      transpose_rows(row, words, sign, out + r, m);
    }
  }

  void column_dots(const uint32_t* a, const uint32_t* b, int64_t m, float* sums) const {
    dots_of_columns<BFloat16Dot>(a, b, dim_words(), m, sums);
  }

  void pack_query_rows(const Features& y, int64_t begin, int64_t count, uint32_t* out) const {
    for (int64_t w = 0; w < padded_queries(count) / 2; ++w)
      pack_pair(y, 2 * w < count ? begin + 2 * w : -1, 2 * w + 1 < count ? begin + 2 * w + 1 : -1,
                out + w * padded_dim());
  }

  void pack_key_weights(const float* w, int64_t n, int64_t m, uint32_t* out) const {
    for (int64_t at = 0; at < padded_keys(n) * m; at += 2 * kLanes)
      store_bf16(out + at / 2, load(w + at), load(w + at + kLanes));
  }

  void pack_query_weights(const float* w, int64_t n, int64_t m, uint32_t* out) const {
    const int64_t stride = pair_words(n);
    for (int64_t r = 0; r < 2 * stride; r += 2 * kTile)
      for (int64_t j = 0; j < m; j += kTile) {
        Vec tile[kTile];
        for (int64_t i = 0; i < kTile; ++i) {
          const int64_t low = r + 2 * i;
          tile[i] = bf16_pairs(low < n ? load(w + low * m + j) : Vec{},
                               low + 1 < n ? load(w + (low + 1) * m + j) : Vec{});
        }
        store_transposed(tile, out + j * stride + r / 2, stride);
      }
  }

  void scores(const KeyRows& keys, const uint32_t* query_columns, int64_t n, int64_t m,
              float* c) const {
    const int64_t rows = padded_keys(n), whole = rows < keys.whole ? rows : keys.whole;
    multiply_tiles({keys.words, keys.stride}, {query_columns, m}, c, m, whole, m, dim_words(), false,
                   true, step(), nothing_done);
    if (whole < rows)
      multiply_tiles({keys.tail, dim_words()}, {query_columns, m}, c + whole * m, m, rows - whole, m,
                     dim_words(), false, true, step(), nothing_done);
  }

  template <class Done>
  void into_keys(const uint32_t* key_weights, const uint32_t* query_rows, int64_t n, int64_t m,
                 int64_t, float* c, bool accumulate, bool keep, const Done& done) const {
    multiply_tiles({key_weights, m / 2}, {query_rows, padded_dim()}, c, padded_dim(),
                   padded_keys(n), padded_dim(), m / 2, accumulate, keep, step(), [&](int64_t r) {
                     done(r, n - r < 2 * kTile ? n - r : 2 * kTile,
                          c + (keep ? r * padded_dim() : 0));
                   });
  }

  void into_queries(const uint32_t* query_weights, const KeyRows& columns, int64_t n, int64_t m,
                    float* c, bool accumulate) const {
    multiply_tiles({query_weights, pair_words(n)}, {columns.words, columns.stride}, c, padded_dim(),
                   m, padded_dim(), pair_words(n), accumulate, true, step(), nothing_done);
  }

 private:
  static const uint16_t* row_of(const Features& x, int64_t row) {
    return static_cast<const uint16_t*>(x.data) + row * x.stride;
  }

  // One row, or zeros for row -1, as words along dim.
  void pack_row(const Features& x, int64_t row, uint32_t* out) const {
    const int64_t words = dim_words(), used = row < 0 ? 0 : dim;
    std::memset(out + used / 2, 0, (words - used / 2) * 4);
    if (used > 0) std::memcpy(out, row_of(x, row), used * 2);
  }

  // Two rows, zeros for row -1, as words that pair them.
  void pack_pair(const Features& x, int64_t low, int64_t high, uint32_t* out) const {
    for (int64_t d = 0; d < padded_dim(); d += kTile) {
      const int64_t left = dim - d < kTile ? dim - d : kTile;
      const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
      const __m512i a = _mm512_cvtepu16_epi32(
          _mm256_maskz_loadu_epi16(low < 0 ? 0 : mask, row_of(x, low < 0 ? 0 : low) + d));
      const __m512i b = _mm512_cvtepu16_epi32(
          _mm256_maskz_loadu_epi16(high < 0 ? 0 : mask, row_of(x, high < 0 ? 0 : high) + d));
      _mm512_storeu_si512(out + d, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
    }
  }
};

}  // namespace

#endif
