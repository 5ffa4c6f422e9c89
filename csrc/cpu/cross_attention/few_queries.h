// The passes over a task of a few query rows, such as one class token against all patches: keys and
// values are read where they lie, once for each query, and nothing is packed. For so few rows
// packing them, and matmuls whose lanes are query rows, take several times as long as reading them.
#pragma once

#include "pass.h"

namespace {

constexpr int64_t kFewQueries = 4;
#if defined(__AMX_BF16__)
constexpr int64_t kFewBFloat16Queries = 1;  // of more of them tiles are faster
#else
constexpr int64_t kFewBFloat16Queries = kFewQueries;
#endif

template <class Scalar, int kDim>
class FewQueries {
  static_assert(kDim % kLanes == 0);
  static constexpr int kVectors = kDim / kLanes;
  static constexpr int64_t kRun = 64;  // rows that are added up before they join the others

  // Floats of scratch: a row of weights, the gradients of queries, and of every row the query and
  // the gradient of the output.
  struct Layout : ScratchLayout {
    explicit Layout(int64_t attended_keys) {
      weights = take(round_up(attended_keys, kLanes));
      dq = take(kFewQueries * kDim);
      q = take(kFewQueries * kDim);
      grad = take(kFewQueries * kDim);
      row = take(kDim);
    }
    int64_t weights, dq, q, grad, row;
  };

 public:
  static int64_t scratch_floats(int64_t attended_keys) { return Layout(attended_keys).total; }

  FewQueries(const AttentionProblem& p, const AttentionTask& task, float* scratch)
      : p_(p),
        task_(task),
        keys_(attended_rows(p, task, p.k)),
        values_(attended_rows(p, task, p.v)),
        next_keys_(next_rows(p, task, p.k)),
        next_values_(next_rows(p, task, p.v)),
        at_(task.attended_keys),
        scratch_(scratch) {}

  void run(const AttentionForward& out) {
    const OutputRows to = query_outputs(p_, task_, out.out);
    for (int64_t i = 0; i < task_.queries; ++i) {
      const int64_t n = visible(p_, task_, i + 1);
      const Operand query = logit_operand(i);
      float* weights = scratch_ + at_.weights;
      Vec most = splat(kNegativeInfinity);
      for (int64_t r = 0; r < n; r += kLanes) {
        prefetch(keys_, values_, r + kLanes, n);
        const Vec logits = dots(query, keys_, r, n, kNegativeInfinity);
        store(weights + r, logits);
        most = max(logits, most);
      }
      float largest = horizontal_max(most);
      largest = largest > kNegativeInfinity ? largest * logit_factor(p_) : 0.0f;
      const float total = exponentials(n, largest, weights);
      const float reciprocal = total > 0.0f ? 1.0f / total : total;
      store_row(scaled(weighted_values(n, weights), reciprocal), to[i]);
      const int64_t row = task_.head * p_.total_queries + task_.first_query + i;
      out.statistics[row] = largest;
      out.statistics[p_.heads * p_.total_queries + row] = reciprocal;
    }
    finish_streams();
  }

  void run(const AttentionBackward& out) {
    float deltas[kFewQueries], most[kFewQueries], reciprocals[kFewQueries];
    int64_t seen[kFewQueries];
    for (int64_t i = 0; i < task_.queries; ++i) {
      write(read(query_row(p_.q, i)), at(at_.q, i));
      write(read(query_row(p_.grad, i)), at(at_.grad, i));
      write({}, at(at_.dq, i));
      const AttendedRows result = {query_rows(p_, task_, out.out), nullptr, task_.queries};
      deltas[i] = dots(operand(query_row(p_.grad, i)), result, i, i + 1, 0.0f)[0];
      const int64_t row = task_.head * p_.total_queries + task_.first_query + i;
      most[i] = out.statistics[row];
      reciprocals[i] = out.statistics[p_.heads * p_.total_queries + row];
      seen[i] = visible(p_, task_, i + 1);
    }
    const OutputRows dk = key_outputs(p_, task_, out.dk), dv = key_outputs(p_, task_, out.dv);
    for (int64_t r = 0; r < task_.attended_keys; r += kLanes) {
      alignas(64) float weights[kFewQueries][kLanes], derivatives[kFewQueries][kLanes];
      prefetch(keys_, next_keys_, r + kLanes, task_.attended_keys);
      prefetch(values_, next_values_, r + kLanes, task_.attended_keys);
      for (int64_t i = 0; i < task_.queries; ++i) {
        const Vec s = dots(logit_operand(i), keys_, r, seen[i], kNegativeInfinity);
        const Vec t = dots(operand(query_row(p_.grad, i)), values_, r, seen[i], 0.0f);
        const Vec w = exp2(s * logit_factor(p_) - splat(most[i])) * reciprocals[i];
        store(weights[i], w);
        store(derivatives[i], w * (t - splat(deltas[i])) * p_.scale);
      }
      const int64_t count = std::min<int64_t>(kLanes, task_.attended_keys - r);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t key = task_.key(r + j);
        store_row(sum_of_rows(at_.q, derivatives, j), dk[key]);
        store_row(sum_of_rows(at_.grad, weights, j), dv[key]);
      }
      for (int64_t i = 0; i < task_.queries; ++i) add_keys(r, count, derivatives[i], at(at_.dq, i));
    }
    const OutputRows dq = query_outputs(p_, task_, out.dq);
    for (int64_t i = 0; i < task_.queries; ++i) store_row(read(at(at_.dq, i)), dq[i]);
    clear_masked(p_, task_, out.dk);
    clear_masked(p_, task_, out.dv);
    finish_streams();
  }

 private:
  struct Row {
    Vec at[kVectors];
  };

  static AttendedRows next_rows(const AttentionProblem& p, const AttentionTask& task,
                                const AttentionInput& input) {
    return task.next == nullptr ? AttendedRows{} : attended_rows(p, *task.next, input);
  }
  static const Scalar* row_of(const AttendedRows& rows, int64_t r) {
    return static_cast<const Scalar*>(rows.features.data) + rows[r] * rows.features.stride;
  }
  const Scalar* query_row(const AttentionInput& input, int64_t i) const {
    return static_cast<const Scalar*>(query_rows(p_, task_, input).data) + i * input.row;
  }
  float* at(int64_t offset, int64_t i) const { return scratch_ + offset + i * kDim; }

  [[gnu::always_inline]] static Vec piece(const float* row, int v) {
    return load(row + v * kLanes);
  }
  [[gnu::always_inline]] static Vec piece(const uint16_t* row, int v) {
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    Halves halves;
    std::memcpy(&halves, row + v * kLanes, sizeof(halves));
    return (Vec)(__builtin_convertvector(halves, VecU) << 16);
  }
  template <class T>
  [[gnu::always_inline]] static Row read(const T* row) {
    Row x;
    FASTVLP_UNROLL
    for (int v = 0; v < kVectors; ++v) x.at[v] = piece(row, v);
    return x;
  }
  [[gnu::always_inline]] static Row scaled(Row x, float factor) {
    FASTVLP_UNROLL
    for (int v = 0; v < kVectors; ++v) x.at[v] = x.at[v] * factor;
    return x;
  }
  template <class T>
  [[gnu::always_inline]] static void add(Row& sum, float factor, const T* row) {
    FASTVLP_UNROLL
    for (int v = 0; v < kVectors; ++v) sum.at[v] = sum.at[v] + splat(factor) * piece(row, v);
  }
  [[gnu::always_inline]] static void write(const Row& x, float* out) {
    FASTVLP_UNROLL
    for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, x.at[v]);
  }

  // A query row, or the gradient of one, as dot products take it.
#if defined(__AVX512BF16__)
  struct Words {
    static constexpr int kWords = kDim / (2 * kLanes);
    __m512bh at[kWords];
  };
  using Operand = std::conditional_t<std::is_same_v<Scalar, uint16_t>, Words, Row>;
  [[gnu::always_inline]] static Words operand(const uint16_t* row, bool negate = false) {
    Words x;
    const __m512i sign = _mm512_set1_epi32(negate ? static_cast<int>(0x80008000u) : 0);
    FASTVLP_UNROLL
    for (int w = 0; w < Words::kWords; ++w)
      x.at[w] = (__m512bh)_mm512_xor_si512(_mm512_loadu_si512(row + w * 2 * kLanes), sign);
    return x;
  }
  [[gnu::always_inline]] static Vec products(const Words& x, const uint16_t* row) {
    __m512 sum = _mm512_setzero_ps();
    FASTVLP_UNROLL
    for (int w = 0; w < Words::kWords; ++w)
      sum = _mm512_dpbf16_ps(sum, x.at[w], (__m512bh)_mm512_loadu_si512(row + w * 2 * kLanes));
    return (Vec)sum;
  }
#else
  using Operand = Row;
#endif
  template <class T>
  [[gnu::always_inline]] static Row operand(const T* row, bool negate = false) {
    return scaled(read(row), negate ? -1.0f : 1.0f);
  }
  template <class T>
  [[gnu::always_inline]] static Vec products(const Row& x, const T* row) {
    Vec sum = x.at[0] * piece(row, 0);
    FASTVLP_UNROLL
    for (int v = 1; v < kVectors; ++v) sum = sum + x.at[v] * piece(row, v);
    return sum;
  }
  // Negated where logits have the other sign than dot products.
  [[gnu::always_inline]] Operand logit_operand(int64_t i) const {
    return operand(query_row(p_.q, i), p_.scale < 0);
  }

  // Dot products of `x` with rows [first, end), as many as there are lanes, and `rest` beyond.
  [[gnu::always_inline]] static Vec dots(const Operand& x, const AttendedRows& rows, int64_t first,
                                         int64_t end, float rest) {
    Vec found[kLanes];
    if (end - first >= kLanes) {
      FASTVLP_UNROLL
      for (int j = 0; j < kLanes; ++j) found[j] = products(x, row_of(rows, first + j));
      return sums_of_lanes(found);
    }
    for (int j = 0; j < kLanes; ++j)
      found[j] = first + j < end ? products(x, row_of(rows, first + j)) : Vec{};
    Vec sums = sums_of_lanes(found);
    for (int64_t j = end > first ? end - first : 0; j < kLanes; ++j) sums[j] = rest;
    return sums;
  }

  // Lane j: the sum of the lanes of x[j]. Pairwise, each step on half as many vectors.
  [[gnu::always_inline]] static Vec sums_of_lanes(const Vec x[kLanes]) {
#if defined(__AVX512F__)
    __m512 fours[4];
    FASTVLP_UNROLL
    for (int i = 0; i < 4; ++i) {
      const auto twos = [&](int at) {
        const __m512 a = (__m512)x[at], b = (__m512)x[at + 1];
        return (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
      };
      const __m512d a = twos(4 * i), b = twos(4 * i + 2);
      fours[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
    const auto halves = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return (Vec)halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]));
#elif defined(__AVX2__)
    __m256 fours[2];
    FASTVLP_UNROLL
    for (int i = 0; i < 2; ++i) {
      const auto twos = [&](int at) {
        const __m256 a = (__m256)x[at], b = (__m256)x[at + 1];
        return (__m256d)_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
      };
      const __m256d a = twos(4 * i), b = twos(4 * i + 2);
      fours[i] = _mm256_add_ps((__m256)_mm256_unpacklo_pd(a, b), (__m256)_mm256_unpackhi_pd(a, b));
    }
    return (Vec)_mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                              _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
#else
    Vec sums;
    for (int j = 0; j < kLanes; ++j) sums[j] = horizontal_sum(x[j]);
    return sums;
#endif
  }

  // Logits, `n` of them padded to whole vectors by -infinity, to exponentials, and their sum.
  [[gnu::always_inline]] float exponentials(int64_t n, float largest, float* weights) const {
    const float factor = logit_factor(p_);
    Vec total = {};
    for (int64_t r = 0; r < n; r += kLanes) {
      const Vec e = exp2(load(weights + r) * factor - splat(largest));
      total = total + e;
      store(weights + r, e);
    }
    return horizontal_sum(total);
  }

  [[gnu::always_inline]] Row weighted_values(int64_t n, const float* weights) const {
    Row total = {};
    for (int64_t first = 0; first < n; first += kRun) {
      Row even = {}, odd = {};  // two sums: the next addition to one waits for the last one to it
      const int64_t end = std::min(n, first + kRun);
      int64_t r = first;
      for (; r + 1 < end; r += 2) {
        if (r % kLanes == 0) prefetch(values_, next_keys_, r + kLanes, n);
        add(even, weights[r], row_of(values_, r));
        add(odd, weights[r + 1], row_of(values_, r + 1));
      }
      if (r < end) add(even, weights[r], row_of(values_, r));
      FASTVLP_UNROLL
      for (int v = 0; v < kVectors; ++v) total.at[v] = total.at[v] + (even.at[v] + odd.at[v]);
    }
    return total;
  }

  // The queries' rows of `offset` times their factors of a key.
  [[gnu::always_inline]] Row sum_of_rows(int64_t offset, const float factors[][kLanes],
                                         int64_t j) const {
    Row sum = {};
    for (int64_t i = 0; i < task_.queries; ++i) add(sum, factors[i][j], at(offset, i));
    return sum;
  }

  [[gnu::always_inline]] void add_keys(int64_t first, int64_t count, const float* factors,
                                       float* sums) const {
    Row sum = {};
    for (int64_t j = 0; j < count; ++j) add(sum, factors[j], row_of(keys_, first + j));
    FASTVLP_UNROLL
    for (int v = 0; v < kVectors; ++v)
      store(sums + v * kLanes, load(sums + v * kLanes) + sum.at[v]);
  }

  // As many rows as there are lanes from `first` on, past `end` the first ones of `next`.
  [[gnu::always_inline]] static void prefetch(const AttendedRows& rows, const AttendedRows& next,
                                              int64_t first, int64_t end) {
    for (int64_t r = first; r < first + kLanes; ++r)
      if (r < end)
        prefetch_row<3>(rows, r, kDim);
      else
        prefetch_row<3>(next, r - end, kDim);
  }

  void store_row(const Row& x, void* out) const {
    write(x, scratch_ + at_.row);
    ::store_row(p_, scratch_ + at_.row, out);
  }

  const AttentionProblem& p_;
  const AttentionTask& task_;
  const AttendedRows keys_, values_, next_keys_, next_values_;
  const Layout at_;
  float* scratch_;
};

}  // namespace
