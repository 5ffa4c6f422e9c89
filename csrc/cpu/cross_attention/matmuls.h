// Attention's matmuls on SIMD registers. Weights lie transposed, [keys][queries]: then a
// softmax over the keys runs along the lanes, and keys and values enter every matmul as rows, where
// they are read by broadcast.
//
// A Matmuls class offers, for one head of one segment with n key rows x [n, dim] and one block of m
// query rows y [m, dim] (weights w are fp32 [padded n][padded m]):
//   scores       C[n][m]   = x y^T   of x as key_rows and y as query_columns
//   into_keys    C[n][d] (+)= w y    of w as key_weights and y as query_rows
//   into_queries C[d][m] (+)= x^T w  of w as query_weights and x as key_columns
#pragma once

#include "../core/prefetch.h"
#include "../gemm/pack.h"

namespace {

// An operand of key rows.
struct KeyRows {
  const uint32_t* words;
  int64_t stride;  // words from one row to the next
};

// How many rows before its copy a row is prefetched where no task before this one did so.
constexpr int64_t kPrefetchRows = 24;

// out[k * m + i] = rows[i * words + k] ^ sign, of kLanes rows of `words`, a multiple of kLanes.
inline void transpose_rows(const uint32_t* rows, int64_t words, uint32_t sign, uint32_t* out,
                           int64_t m) {
  for (int64_t k = 0; k < words; k += kLanes) {
    Vec tile[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const Vec row = load(reinterpret_cast<const float*>(rows + i * words + k));
      tile[i] = (Vec)(bits(row) ^ static_cast<int32_t>(sign));
    }
    store_transposed(tile, out + k * m, m);
  }
}

// sums[m] of the elementwise product of two operands of query columns. In the order of a matmul
// over the same columns, so that a weight of 1 has a gradient of 0 and not of rounding.
template <class Dot>
void dots_of_columns(const uint32_t* a, const uint32_t* b, int64_t words, int64_t m, float* sums) {
  const auto words_at = [](const uint32_t* p) {
    return bits(load(reinterpret_cast<const float*>(p)));
  };
  for (int64_t i = 0; i < m; i += kLanes) {
    Vec total = {};
    for (int64_t k = 0; k < words; k += Dot::kMaxDepth) {
      Vec sum = {};
      for (int64_t w = k; w < words && w < k + Dot::kMaxDepth; ++w) {
        const VecI left = words_at(a + w * m + i), right = words_at(b + w * m + i);
        if constexpr (Dot::kPerWord == 1) {
          sum = Dot::step(sum, (Vec)right, (Vec)left);
        } else {
          sum = sum + (Vec)(left << 16) * (Vec)(right << 16);
          sum = sum + (Vec)(left & -65536) * (Vec)(right & -65536);
        }
      }
      total = k > 0 ? sum + total : sum;
    }
    store(sums + i, total);
  }
}

// A row as word_row gives it; of so few bytes a call of memcpy takes several times as long.
template <class Dot>
inline void copy_row(const Features& m, int64_t row, int64_t dim, uint32_t* out) {
  constexpr Element element = Dot::kPerWord == 1 ? Element::kFloat32 : Element::kBFloat16;
  if (m.element != element || dim % (Dot::kPerWord * kLanes) != 0)
    return word_row<Dot>(m, row, dim, out);
  const char* from = static_cast<const char*>(m.data) + row * m.stride * bytes_of(element);
  for (int64_t w = 0; w < dim / Dot::kPerWord; w += kLanes) {
    Vec words;
    std::memcpy(&words, from + w * 4, kVectorBytes);
    std::memcpy(out + w, &words, kVectorBytes);
  }
}

constexpr auto nothing_done = [](int64_t) {};

template <class Dot>
struct SimdMatmuls {
  static constexpr bool kFloat = Dot::kPerWord == 1;
  static constexpr int64_t kQueryBlock = 64;
  static constexpr int64_t kKeyBlock = 64;
  // Floats enter the matmuls as they are; the weights are unpacked operands.
  static constexpr bool kWeightsUnpacked = kFloat;

  const int64_t dim;
  mutable Prefetcher prefetcher;  // advances with the matmuls
  explicit SimdMatmuls(int64_t d) : dim(d) {}

  int64_t padded_keys(int64_t n) const { return round_up(n, kRegisterRows); }
  int64_t padded_queries(int64_t m) const { return round_up(m, kLanes * Dot::kPerWord); }
  int64_t padded_dim() const { return round_up(dim, kLanes); }
  int64_t key_row_words() const { return round_up(depth_words<Dot>(dim), kRegisterRows); }
  int64_t column_words() const { return round_up(dim, kRegisterRows); }

  // What a matmul calls between its blocks.
  auto step() const {
    return [this](int64_t words) { prefetcher.step(words * Dot::kPerWord); };
  }

  // Words of each operand; the capacity n or m is a padded count. `row` is scratch for kLanes rows
  // of a query operand or of output.
  int64_t row_words() const { return kLanes * padded_dim(); }
  int64_t key_rows_words(int64_t n) const { return n * key_row_words(); }
  int64_t key_columns_words(int64_t n) const {
    return kFloat ? 0 : depth_words<Dot>(n) * column_words();
  }
  int64_t query_columns_words(int64_t m) const {
    return round_up(depth_words<Dot>(dim), kLanes) * m;
  }
  int64_t query_rows_words(int64_t m) const { return depth_words<Dot>(m) * padded_dim(); }
  int64_t key_weights_words(int64_t n, int64_t m) const {
    return kFloat ? 0 : n * depth_words<Dot>(m);
  }
  int64_t query_weights_words(int64_t n, int64_t m) const {
    return kFloat ? 0 : depth_words<Dot>(n) * m;
  }
  int64_t into_queries_floats(int64_t m) const { return padded_dim() * m; }

  // Always packed: as unpacked operands, rows that lie many lines apart push each other out of the
  // first-level cache.
  KeyRows key_rows(const AttendedRows& x, uint32_t* out) const {
    const int64_t words = depth_words<Dot>(dim), stride = key_row_words();
    for (int64_t r = 0; r < padded_keys(x.count); ++r) {
      prefetch_row<3>(x, r + kPrefetchRows, dim);
      if (r < x.count) copy_row<Dot>(x.features, x[r], dim, out + r * stride);
      const int64_t used = r < x.count ? words : 0;
      if (used < stride) std::memset(out + r * stride + used, 0, (stride - used) * 4);
    }
    return {out, stride};
  }

  // The columns of floats are the rows themselves.
  KeyRows key_columns(const AttendedRows& x, uint32_t* out) const {
    if constexpr (kFloat) {
      return key_rows(x, out);
    } else {
      const int64_t stride = column_words();
      for (int64_t w = 0; w < depth_words<Dot>(x.count); ++w) {
        const uint16_t* first = half_row(x, 2 * w);
        const bool pair = 2 * w + 1 < x.count;
        const uint16_t* second = half_row(x, pair ? 2 * w + 1 : 2 * w);
        const uint32_t keep = pair ? 0xffffu : 0u;
        uint32_t* row = out + w * stride;
        for (int64_t d = 0; d < dim; ++d) row[d] = first[d] | (second[d] & keep) << 16;
        std::memset(row + dim, 0, (stride - dim) * 4);
      }
      return {out, stride};
    }
  }

  // Query rows [begin, begin + count), negated where `negate`.
  void pack_query_columns(const Features& y, int64_t begin, int64_t count, bool negate,
                          uint32_t* out, uint32_t* row) const {
    const int64_t m = padded_queries(count), stride = round_up(depth_words<Dot>(dim), kLanes);
    const uint32_t sign = !negate ? 0u : kFloat ? 0x80000000u : 0x80008000u;
    for (int64_t r = 0; r < m; r += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i)
        if (r + i < count)
          copy_row<Dot>(y, begin + r + i, dim, row + i * stride);
        else
          std::memset(row + i * stride, 0, stride * 4);
      transpose_rows(row, stride, sign, out + r, m);
    }
  }

  void column_dots(const uint32_t* a, const uint32_t* b, int64_t m, float* sums) const {
    dots_of_columns<Dot>(a, b, depth_words<Dot>(dim), m, sums);
  }

  void pack_query_rows(const Features& y, int64_t begin, int64_t count, uint32_t* out) const {
    const int64_t m = padded_queries(count), stride = padded_dim();
    for (int64_t w = 0; w < depth_words<Dot>(m); ++w) {
      uint32_t* row = out + w * stride;
      std::memset(row, 0, stride * 4);
      if constexpr (kFloat) {
        if (w < count) copy_row<Dot>(y, begin + w, dim, row);
      } else {
        if (2 * w >= count) continue;
        const uint16_t* first = static_cast<const uint16_t*>(y.data) + (begin + 2 * w) * y.stride;
        const bool pair = 2 * w + 1 < count;
        for (int64_t d = 0; d < dim; ++d)
          row[d] = first[d] | (pair ? static_cast<uint32_t>(first[y.stride + d]) << 16 : 0u);
      }
    }
  }

  void pack_key_weights([[maybe_unused]] const float* w, [[maybe_unused]] int64_t n,
                        [[maybe_unused]] int64_t m, [[maybe_unused]] uint32_t* out) const {
#if defined(__AVX512BF16__)
    if constexpr (!kFloat)
      for (int64_t at = 0; at < padded_keys(n) * m; at += 2 * kLanes)
        store_bf16(out + at / 2, load(w + at), load(w + at + kLanes));
#endif
  }

  void pack_query_weights([[maybe_unused]] const float* w, [[maybe_unused]] int64_t n,
                          [[maybe_unused]] int64_t m, [[maybe_unused]] uint32_t* out) const {
#if defined(__AVX512BF16__)
    if constexpr (!kFloat)
      for (int64_t r = 0; r < n; r += 2)
        for (int64_t j = 0; j < m; j += kLanes)
          store_bf16_pairs(out + r / 2 * m + j, load(w + r * m + j),
                           r + 1 < n ? load(w + (r + 1) * m + j) : Vec{});
#endif
  }

  void scores(const KeyRows& keys, const uint32_t* query_columns, int64_t n, int64_t m,
              float* c) const {
    multiply_rows<Dot, Order::kDepthContiguous>(
        keys.words, keys.stride, floats(query_columns), m, c, m, padded_keys(n), m / kLanes,
        depth_words<Dot>(dim), false, true, step(), nothing_done);
  }

  // `queries` of the m are no padding. done(r, count, sums) gets the rows from r on when they are
  // complete; `c` holds them all if `keep`, else as many as one call of it gets.
  template <class Done>
  void into_keys(const uint32_t* key_weights, const uint32_t* query_rows, int64_t n, int64_t m,
                 int64_t queries, float* c, bool accumulate, bool keep, const Done& done) const {
    multiply_rows<Dot, Order::kDepthContiguous>(
        key_weights, depth_words<Dot>(m), floats(query_rows), padded_dim(), c, padded_dim(),
        padded_keys(n), padded_dim() / kLanes, depth_words<Dot>(queries), accumulate, keep, step(),
        [&](int64_t r) {
          done(r, n - r < kRegisterRows ? n - r : kRegisterRows, c + (keep ? r * padded_dim() : 0));
        });
  }

  void into_queries(const uint32_t* query_weights, const KeyRows& columns, int64_t n, int64_t m,
                    float* c, bool accumulate) const {
    multiply_rows<Dot, Order::kRowContiguous>(
        columns.words, columns.stride, floats(query_weights), m, c, m, column_words(), m / kLanes,
        depth_words<Dot>(n), accumulate, true, step(), nothing_done);
  }

 private:
  static const float* floats(const uint32_t* words) {
    return reinterpret_cast<const float*>(words);
  }
  static const uint16_t* half_row(const AttendedRows& x, int64_t r) {
    return static_cast<const uint16_t*>(x.features.data) + x[r] * x.features.stride;
  }
};

}  // namespace
