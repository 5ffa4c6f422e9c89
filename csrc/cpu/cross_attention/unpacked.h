// bfloat16 attention on AMX tiles with unpacked operands, keys and values read where they lie:
// blocks of such rows, matmuls of them, and words that join two of them.
//
// Words of two rows come out of one instruction in another order: of 32 columns the first 16 are 0
// to 3, 8 to 11, 16 to 19 and 24 to 27, the others follow. Sums keep that order until they are
// done.
#pragma once

#include "remainder.h"

#if defined(__AMX_BF16__)

namespace {

// Rows of bfloat16, `stride` elements apart.
struct RowBlock {
  const uint16_t* data;
  int64_t stride;
  const uint16_t* operator[](int64_t r) const { return data + r * stride; }
  void advance(int64_t rows) { data += rows * stride; }
};

// The first `count` of a task's rows of k or v, and those of the next task.
template <int kDim>
class RowBlocks {
 public:
  RowBlocks(const AttentionProblem& p, const AttentionTask& task, const AttentionInput& input,
            int64_t count)
      : rows_(attended_rows(p, task, input).slice(0, count)), next_{{}, nullptr, 0} {
    if (task.next != nullptr) next_ = attended_rows(p, *task.next, input);
  }

  explicit RowBlocks(const AttendedRows& rows) : rows_(rows), next_{{}, nullptr, 0} {}

  // Rows [first, first + n) where they lie, or in `copy` where that is not evenly or they are
  // fewer; zeros there past the last.
  RowBlock block(int64_t first, int64_t n, uint32_t* copy) const {
    if (rows_.attended == nullptr && first + n <= rows_.count) return {row(rows_, first), stride()};
    uint16_t* to = reinterpret_cast<uint16_t*>(copy);
    for (int64_t r = 0; r < n; ++r, to += kDim)
      if (first + r < rows_.count)
        std::memcpy(to, row(rows_, first + r), kDim * 2);
      else
        std::memset(to, 0, kDim * 2);
    return {reinterpret_cast<uint16_t*>(copy), kDim};
  }

  // Rows [first, first + n) to fetch, past `end` those of the next task, of which none if there are
  // fewer. Fetches them at once where they do not lie evenly.
  RowBlock to_prefetch(int64_t first, int64_t n, int64_t end) const {
    const AttendedRows& rows = first < end ? rows_ : next_;
    if (first >= end) first -= end;
    if (first + n <= rows.count && rows.attended == nullptr) return {row(rows, first), stride()};
    for (int64_t r = first; r < first + n; ++r) prefetch_row<2>(rows, r, kDim);
    return {row(rows_, 0), 0};
  }

 private:
  int64_t stride() const { return rows_.features.stride; }
  static const uint16_t* row(const AttendedRows& rows, int64_t r) {
    return static_cast<const uint16_t*>(rows.features.data) + rows[r] * rows.features.stride;
  }

  AttendedRows rows_, next_;
};

// Fetches the first two rows of a block into the cache of level 1 (locality 3) or 2 (locality 2).
template <int kDim, int locality>
[[gnu::always_inline]] inline void prefetch_rows(const RowBlock& x) {
  FASTVLP_UNROLL
  for (int64_t r = 0; r < 2; ++r) FASTVLP_UNROLL
  for (int64_t d = 0; d < kDim; d += 32) __builtin_prefetch(x[r] + d, 0, locality);
}

// Fetches k and v of the heads that a thread takes after this task's run into L2,
// each task of the run a share: row by row, all heads of a row, so that memory is read in order.
template <int kDim>
class RunPrefetcher {
  static constexpr int64_t kMostBytes = int64_t{2} << 20;         // of that cache
  static constexpr int64_t kBytes = 2 * kDim * sizeof(uint16_t);  // of a row of two heads

 public:
  void start(const AttentionProblem& p, const AttentionTask& task) {
    if (task.next_run == nullptr || p.k.head != kDim || p.v.head != kDim) return;
    const AttentionTask& next = *task.next_run;
    keys_ = attended_rows(p, next, p.k);
    values_ = attended_rows(p, next, p.v);
    pairs_ = next.run / 2;
    if (2 * keys_.count * pairs_ * kBytes > kMostBytes) return;
    row_ = keys_.count * task.place / task.run;
    left_ = (keys_.count * (task.place + 1) / task.run - row_) * pairs_;
    if (left_ > 0) begin_row();
  }

  // A row of two heads.
  [[gnu::always_inline]] void operator()() {
    if (left_ <= 0) return;
    FASTVLP_UNROLL
    for (int64_t b = 0; b < kBytes; b += 64) __builtin_prefetch(key_ + b, 0, 2);
    FASTVLP_UNROLL
    for (int64_t b = 0; b < kBytes; b += 64) __builtin_prefetch(value_ + b, 0, 2);
    key_ += kBytes, value_ += kBytes;
    --left_;
    if (--pairs_left_ == 0 && left_ > 0) ++row_, begin_row();
  }

 private:
  void begin_row() {
    const auto at = [&](const AttendedRows& rows) {
      const auto* data = static_cast<const uint16_t*>(rows.features.data);
      return reinterpret_cast<const char*>(data + rows[row_] * rows.features.stride);
    };
    key_ = at(keys_), value_ = at(values_);
    pairs_left_ = pairs_;
  }

  AttendedRows keys_, values_;
  const char *key_, *value_;
  int64_t row_, pairs_, pairs_left_, left_ = 0;
};

// Sixteen words of each half of 32 columns of two rows, to `words` and words + kHalfWords.
[[gnu::always_inline]] inline void store_joined(__m512i low, __m512i high, uint32_t* words) {
  _mm512_store_si512(words, _mm512_unpacklo_epi16(low, high));
  _mm512_store_si512(words + kHalfWords, _mm512_unpackhi_epi16(low, high));
}

// The column, or row, that is the i-th of 32 so joined.
inline int64_t joined_at(int64_t i) { return i % kTile / 4 * 8 + i % 4 + i / kTile * 4; }

// Sums [32][kDim] whose rows and columns are joined ones, in order.
template <int kDim>
inline void order_sums(const float* in, float* out) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int64_t r = 0; r < kStepSide; ++r, in += kDim)
    for (int64_t d = 0; d < kDim; d += kStepSide) {
      const __m512 a = _mm512_load_ps(in + d), b = _mm512_load_ps(in + d + kTile);
      float* to = out + joined_at(r) * kDim + d;
      _mm512_store_ps(to, _mm512_permutex2var_ps(a, first, b));
      _mm512_store_ps(to + kTile, _mm512_permutex2var_ps(a, second, b));
    }
}

// Logits [rows][32] that do not count: of keys that are not there or that a row may not attend to.
inline void hide_logits(const WeightBlock& part, int64_t rows, float* s) {
  if (part.p.causal) mask_causal(part, s);
  for (int64_t i = part.n * kStepSide; i < rows * kStepSide; i += kLanes)
    store(s + i, splat(kNegativeInfinity));
}

// Two vectors as a row of bfloat16.
[[gnu::always_inline]] inline __m512i bf16_row(Vec first, Vec second) {
  return words_of(_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}

// Joins two rows of kDim as words of a right operand, kHalfWords apart for sixteen columns.
template <int kDim>
[[gnu::always_inline]] inline void join_rows(const uint16_t* low, const uint16_t* high,
                                             uint32_t* words) {
  FASTVLP_UNROLL
  for (int64_t d = 0; d < kDim; d += kStepSide)
    store_joined(_mm512_loadu_si512(low + d), _mm512_loadu_si512(high + d), words + d * kTile);
}

// One step of sums over 32 keys, [32][32] (+)= A B.
[[gnu::always_inline]] inline void multiply_step(const uint32_t* a, const uint32_t* b,
                                                 BlockTarget& last, const BlockTarget& c,
                                                 bool accumulate) {
  load_step(a, b);
  restart_block(last, c, accumulate);
  last = c;
}

}  // namespace

#endif
