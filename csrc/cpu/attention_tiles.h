// The products of attention on AMX tiles; see attention_products.h for what a Products class is.
// bfloat16 is one plane; float32 and float16 are split in three.
#pragma once

#include "attention_products.h"
#include "tiles.h"

#if defined(__AMX_BF16__)

namespace {

template <int planes>
struct TileProducts {
  static constexpr int64_t kQueryBlock = 128;
  static constexpr bool kWeightsInPlace = false;
  static constexpr bool kQueriesTransposed = false;

  const int64_t dim;
  const TileSession session;
  explicit TileProducts(int64_t d) : dim(d) {}

  int64_t padded_keys(int64_t n) const { return round_up(n, kTile); }
  int64_t padded_queries(int64_t m) const { return round_up(m, 2 * kTile); }
  int64_t padded_dim() const { return round_up(dim, kTile); }
  int64_t dim_words() const { return round_up((dim + 1) / 2, kTile); }
  static int64_t pair_words(int64_t rows) { return round_up((rows + 1) / 2, kTile); }

  int64_t key_rows_words(int64_t n) const { return planes * n * dim_words(); }
  int64_t key_columns_words(int64_t n) const { return planes * pair_words(n) * padded_dim(); }
  int64_t query_columns_words(int64_t m) const { return planes * dim_words() * m; }
  int64_t query_rows_words(int64_t m) const { return planes * (m / 2) * padded_dim(); }
  int64_t key_weights_words(int64_t n, int64_t m) const { return planes * n * (m / 2); }
  int64_t query_weights_words(int64_t n, int64_t m) const { return planes * m * pair_words(n); }
  int64_t into_queries_floats(int64_t m) const { return m * padded_dim(); }
  int64_t row_words() const { return planes * kTile * dim_words(); }

  void pack_key_rows(const SeenRows& x, uint32_t* out) const {
    const int64_t n = padded_keys(x.count), stride = dim_words(), step = n * stride;
    for (int64_t r = 0; r < n; ++r) pack_row(x.features, r < x.count ? x[r] : -1, out + r * stride, step);
  }

  void pack_key_columns(const SeenRows& x, uint32_t* out) const {
    const int64_t pairs = pair_words(x.count), stride = padded_dim();
    for (int64_t w = 0; w < pairs; ++w)
      pack_pair(x.features, 2 * w < x.count ? x[2 * w] : -1, 2 * w + 1 < x.count ? x[2 * w + 1] : -1,
                out + w * stride, pairs * stride);
  }

  void pack_query_columns(const Features& y, int64_t begin, int64_t count, bool negate,
                          uint32_t* out, uint32_t* row) const {
    const int64_t m = padded_queries(count), words = dim_words(), step = words * m;
    const int32_t sign = negate ? static_cast<int32_t>(0x80008000) : 0;
    for (int64_t r = 0; r < m; r += kTile) {
      // Sixteen rows of words, transposed a tile at a time.
      for (int64_t i = 0; i < kTile; ++i)
        pack_row(y, r + i < count ? begin + r + i : -1, row + i * words, kTile * words);
      for (int p = 0; p < planes; ++p)
        for (int64_t k = 0; k < words; k += kTile) {
          Vec tile[16];
          for (int64_t i = 0; i < kTile; ++i)
            tile[i] = (Vec)((VecI)load(floats(row + (p * kTile + i) * words + k)) ^ sign);
          store_transposed(tile, out + p * step + k * m + r, m);
        }
    }
  }

  void pack_query_rows(const Features& y, int64_t begin, int64_t count, uint32_t* out) const {
    const int64_t pairs = padded_queries(count) / 2, stride = padded_dim();
    for (int64_t w = 0; w < pairs; ++w)
      pack_pair(y, 2 * w < count ? begin + 2 * w : -1, 2 * w + 1 < count ? begin + 2 * w + 1 : -1,
                out + w * stride, pairs * stride);
  }

  void pack_key_weights(const float* w, int64_t n, int64_t m, uint32_t* out) const {
    const int64_t step = padded_keys(n) * m / 2;
    for (int64_t at = 0; at < 2 * step; at += 2 * kLanes)
      store_split_row<planes>(load(w + at), load(w + at + kLanes), out + at / 2, step);
  }

  void pack_query_weights(const float* w, int64_t n, int64_t m, uint32_t* out) const {
    const int64_t stride = pair_words(n), step = m * stride;
    for (int64_t r = 0; r < 2 * stride; r += 2 * kTile)
      for (int64_t j = 0; j < m; j += kTile) {
        Vec tile[planes][16];
        for (int64_t i = 0; i < kTile; ++i) {
          const int64_t low = r + 2 * i;
          Vec words[planes];
          split_pairs<planes>(low < n ? load(w + low * m + j) : Vec{},
                              low + 1 < n ? load(w + (low + 1) * m + j) : Vec{}, words);
          for (int p = 0; p < planes; ++p) tile[p][i] = words[p];
        }
        for (int p = 0; p < planes; ++p)
          store_transposed(tile[p], out + p * step + j * stride + r / 2, stride);
      }
  }

  void scores(const uint32_t* key_rows, const uint32_t* query_columns, int64_t keys, int64_t n,
              int64_t m, float* c) const {
    multiply_tiles<planes>({key_rows, dim_words(), padded_keys(keys) * dim_words()},
                           {query_columns, m, dim_words() * m}, c, m, padded_keys(n), m,
                           dim_words(), false);
  }

  void into_keys(const uint32_t* key_weights, const uint32_t* query_rows, int64_t n, int64_t m,
                 int64_t, float* c, bool accumulate) const {
    multiply_tiles<planes>({key_weights, m / 2, padded_keys(n) * m / 2},
                           {query_rows, padded_dim(), m / 2 * padded_dim()}, c, padded_dim(),
                           padded_keys(n), padded_dim(), m / 2, accumulate);
  }

  void into_queries(const uint32_t* query_weights, const uint32_t* key_columns, int64_t keys,
                    int64_t n, int64_t m, float* c) const {
    multiply_tiles<planes>({query_weights, pair_words(n), m * pair_words(n)},
                           {key_columns, padded_dim(), pair_words(keys) * padded_dim()}, c,
                           padded_dim(), m, padded_dim(), pair_words(n), false);
  }

 private:
  static const float* floats(const uint32_t* words) {
    return reinterpret_cast<const float*>(words);
  }

  // One row, or zeros for row -1, as words along dim.
  void pack_row(const Features& x, int64_t row, uint32_t* out, int64_t step) const {
    const int64_t words = dim_words();
    if constexpr (planes == 1) {
      std::memset(out + dim / 2, 0, (words - dim / 2) * 4);
      if (row < 0)
        std::memset(out, 0, words * 4);
      else
        std::memcpy(out, static_cast<const uint16_t*>(x.data) + row * x.stride, dim * 2);
    } else {
      alignas(64) float values[2 * kLanes];
      for (int64_t d = 0; d < 2 * words; d += 2 * kLanes) {
        const float* at = part(x, row, d, 2 * kLanes, values);
        store_split_row<planes>(load(at), load(at + kLanes), out + d / 2, step);
      }
    }
  }

  // Two rows as words that pair them.
  void pack_pair(const Features& x, int64_t low, int64_t high, uint32_t* out, int64_t step) const {
    alignas(64) float a[kLanes], b[kLanes];
    for (int64_t d = 0; d < padded_dim(); d += kLanes) {
      Vec words[planes];
      split_pairs<planes>(load(part(x, low, d, kLanes, a)), load(part(x, high, d, kLanes, b)),
                          words);
      for (int p = 0; p < planes; ++p)
        store(reinterpret_cast<float*>(out + p * step + d), words[p]);
    }
  }

  // Elements [d, d + n) of a row as floats, zero past its end; in place where they are floats.
  const float* part(const Features& x, int64_t row, int64_t d, int64_t n, float* values) const {
    const int64_t left = row < 0 ? 0 : dim - d < n ? dim - d : n;
    if (left == n && x.element == Element::kFloat32)
      return static_cast<const float*>(x.data) + row * x.stride + d;
    std::memset(values, 0, n * 4);
    const int64_t size = x.element == Element::kFloat32 ? 4 : 2;
    const Features from = {static_cast<const char*>(x.data) + d * size, x.rows, x.stride, x.element};
    if (left > 0) convert_row(from, row, left, values);
    return values;
  }
};

}  // namespace

#endif
