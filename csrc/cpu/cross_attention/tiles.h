// What the attention passes on AMX tiles share: the sizes of operands, matmuls with interleaved
// SIMD work, the pieces of that work, and the check whether floats could be split into bf16 parts.
#pragma once

#include <algorithm>

#include "../gemm/interleave.h"
#include "operands.h"
#include "pass.h"

#if defined(__AMX_BF16__)

namespace {

// Operands are blocks of 32 rows or columns, each all steps along K.
template <class Rows>
struct TileShape {
  static constexpr int64_t kStep = Rows::kParts * kPartWords;
  // Calls of Interleaver for a step of a block.
  static constexpr int64_t kCalls = Rows::kParts == 3 ? 6 : 1;
  static constexpr int64_t kQueryBlock = 128;

  const int64_t dim;
  explicit TileShape(int64_t d) : dim(d) {}

  static int64_t padded(int64_t n) { return round_up(n, kStepSide); }
  static int64_t steps(int64_t n) { return padded(n) / kStepDepth; }
  int64_t padded_dim() const { return padded(dim); }
  int64_t padded_queries(int64_t m) const { return padded(m); }
  int64_t dim_steps() const { return steps(dim); }
  static int64_t words(int64_t side, int64_t depth) { return steps(side) * steps(depth) * kStep; }
  static int64_t tiles(int64_t words) { return words / kHalfWords; }
  // Sums over the keys for each query: a matmul of weights, transposed, and keys, or of keys,
  // transposed, and weights; whichever has less to transpose. The first gives [queries][width].
  static bool sums_row_major(int64_t queries) { return queries <= 2 * kStepSide; }
};

// A step of a left operand to tiles 4 and 5, one of a right operand to 6 and 7.
inline void load_step(const uint32_t* a, const uint32_t* b) {
  _tile_loadd(4, a, 64);
  _tile_loadd(6, b, 64);
  _tile_loadd(7, b + kHalfWords, 64);
  _tile_loadd(5, a + kHalfWords, 64);
}

// A stream of matmuls: the last block of one is stored as the next one begins, or at finish().
// Needs a TileSession.
template <class Rows>
class BlockStream {
 public:
  // C[m][n] (+)= A B for whole blocks of 32; blocks of A and B are all their steps apart.
  // Interleaved work finds the results of the matmul before.
  void multiply(const uint32_t* a, int64_t m, const uint32_t* b, int64_t n, int64_t steps, float* c,
                int64_t ldc, bool accumulate, Interleaver& interleaver) {
    const int64_t block = steps * TileShape<Rows>::kStep;
    compiler_barrier(c);
    for (int64_t i = 0; i < m; i += kStepSide)
      for (int64_t j = 0; j < n; j += kStepSide)
        multiply_block(a + i / kStepSide * block, b + j / kStepSide * block, steps,
                       {c + i * ldc + j, ldc}, accumulate, interleaver);
    compiler_barrier(c);
  }

  // Stores what the tiles still hold.
  void finish() {
    if (last_.c == nullptr) return;
    store_block<2, 2>(last_.c, last_.row);
    compiler_barrier(last_.c);
    last_.c = nullptr;
  }

 private:
  void multiply_block(const uint32_t* a, const uint32_t* b, int64_t steps, const BlockTarget& c,
                      bool accumulate, Interleaver& interleaver) {
    const auto first = [&] { restart_block(last_, c, accumulate); };
    if constexpr (Rows::kParts == 3) {
      add_split_steps<2, 2>(a, b, steps, first, interleaver);
    } else {
      for (int64_t s = 0; s < steps; ++s, a += kPartWords, b += kPartWords) {
        load_step(a, b);
        if (s == 0)
          first();
        else
          multiply_tiles<2, 2>();
        interleaver();
      }
    }
    last_ = c;
  }

  BlockTarget last_ = {nullptr, 0};
};

// Calls matmul(key) for all blocks of keys before `end`, which multiplies and does the interleaved
// work, and before each prepare(key) of the next one, which adds such work.
template <class Prepare, class Matmul>
inline void walk_keys(int64_t end, int64_t block, Interleaver& interleaver, const Prepare& prepare,
                      const Matmul& matmul) {
  if (end <= 0) return;
  prepare(0);
  interleaver.finish();
  for (int64_t key = 0, next; key < end; key = next) {
    next = key + block;
    if (next < end) prepare(next);
    matmul(key);
  }
}

// Rows of queries, their gradients and outputs that the next task's backward pass will read first.
inline void prefetch_next_task(const AttentionProblem& p, const AttentionTask& task,
                               const AttentionBackward& out, Prefetcher& prefetcher) {
  if (task.next == nullptr) return;
  prefetcher.start(p.dim, task.attended_keys);
  for (const AttentionInput& input : {p.q, p.grad, out.out})
    prefetcher.add({query_rows(p, *task.next, input), nullptr, task.next->queries});
}

// Packs query rows [begin, begin + count) for a matmul along their width, `columns`, and of one
// along the queries, `rows`, if kAlong. Negates the columns where asked.
template <class Rows, bool kAlong>
inline void place_queries(const TileShape<Rows>& x, const Features& y, int64_t begin, int64_t count,
                          bool negate, uint32_t* columns, uint32_t* rows) {
  using Scalar = typename Rows::Scalar;
  constexpr int64_t step = TileShape<Rows>::kStep;
  const int64_t steps = x.steps(count);
  const auto row_at = [&](int64_t r) {
    return r < count ? static_cast<const Scalar*>(y.data) + (begin + r) * y.stride : nullptr;
  };
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t low = Rows::kApart == 1 ? 2 * i : i, high = low + Rows::kApart;
      uint32_t* block = columns + s * x.dim_steps() * step;
      const RowTargets to = {block + low * kTile, block + high * kTile, step,
                             rows + s * step + i * kTile, steps * step};
      const Scalar *first = row_at(s * kStepDepth + low), *second = row_at(s * kStepDepth + high);
      if (x.dim == x.padded_dim() && first != nullptr && second != nullptr)
        place_rows<Rows, true, kAlong, true>(first, second, x.dim, to);
      else
        place_rows<Rows, true, kAlong, false>(first, second, x.dim, to);
    }
  const int64_t words = steps * x.dim_steps() * step;
  for (int64_t at = 0; at < words; at += kHalfWords) transpose_tile(columns + at);
  for (int64_t at = 0; negate && at < words; ++at) columns[at] ^= 0x80008000u;
}

// Packs a block of keys, a few rows a piece, as operand of a matmul along their width, `rows`, and
// of one along the keys, `columns`, there still [words of keys][width] in each tile; those of them
// that are wanted. Fetches the rows of `next`, as far as pieces go. kDim: their width, 0 where it
// is known at run time only.
template <class Rows, int kDim, bool kRows, bool kColumns>
class KeyPacker {
 public:
  void start(const TileShape<Rows>& x, const AttendedRows& keys, const AttendedRows& next,
             uint32_t* rows, uint32_t* columns) {
    data_ = static_cast<const char*>(keys.features.data);
    stride_ = keys.features.stride * sizeof(Scalar);
    attended_ = keys.attended;
    count_ = keys.count;
    next_ = static_cast<const char*>(next.features.data);
    next_attended_ = next.attended;
    next_count_ = next.count;
    dim_ = x.dim;
    row_ = 0;
    row_words_ = x.dim_steps() * kStep;
    column_words_ = x.steps(keys.count) * kStep;
    rows_ = rows;
    columns_ = columns;
  }
  int64_t left() const { return (round_up(count_, kStepSide) - row_) / kCount; }

  void operator()() {
    if (kDim > 0 && attended_ == nullptr && row_ + kCount <= count_)
      pack<true>();
    else
      pack<false>();
    row_ += kCount;
    rows_ += kCount * kTile;
    columns_ += kCount / 2 * kTile;
    if (row_ % kStepDepth == 0) {
      rows_ += row_words_ - kStepSide * kTile;
      columns_ += kStep - kHalfWords;
    }
  }

 private:
  using Scalar = typename Rows::Scalar;
  static constexpr int64_t kStep = TileShape<Rows>::kStep;
  static constexpr int64_t kCount = Rows::kParts == 3 ? 2 : 8;  // rows a piece

  template <bool whole>
  [[gnu::always_inline]] void pack() const {
    static_assert(kDim % kStepSide == 0);
    const int64_t dim = whole ? kDim : dim_;
    RowTargets to = {rows_, rows_ + kTile, kStep, columns_, column_words_};
    for (int64_t r = row_; r < row_ + kCount; r += 2) {
      const Scalar *low = row_at<whole>(r), *high = row_at<whole>(r + 1);
      fetch(dim, r), fetch(dim, r + 1);
      place_rows<Rows, kRows, kColumns, whole>(low, high, dim, to);
      to.low += 2 * kTile, to.high += 2 * kTile, to.pairs += kTile;
    }
  }

  template <bool whole>
  [[gnu::always_inline]] const Scalar* row_at(int64_t r) const {
    if (!whole && r >= count_) return nullptr;
    return reinterpret_cast<const Scalar*>(data_ +
                                           (whole || !attended_ ? r : attended_[r]) * stride_);
  }

  [[gnu::always_inline]] void fetch(int64_t dim, int64_t r) const {
    if (r >= next_count_) return;
    const char* at = next_ + (next_attended_ ? next_attended_[r] : r) * stride_;
    for (int64_t b = 0; b < dim * static_cast<int64_t>(sizeof(Scalar)); b += 64)
      __builtin_prefetch(at + b, 0, 2);
  }

  const char *data_, *next_;
  const int32_t *attended_, *next_attended_;
  int64_t stride_, count_, next_count_, dim_, row_words_, column_words_, row_;
  uint32_t *rows_, *columns_;
};

// The first `count` of a task's rows of k or v: the block that begins at a key, and the block after
// it, which may be the first one of the next task.
class KeyBlocks {
 public:
  KeyBlocks(const AttentionProblem& p, const AttentionTask& task, const AttentionInput& input,
            int64_t count, int64_t block)
      : rows_(attended_rows(p, task, input).slice(0, count)),
        following_{{}, nullptr, 0},
        block_(block) {
    if (task.next != nullptr) following_ = block_of(attended_rows(p, *task.next, input), 0);
  }
  AttendedRows at(int64_t key) const { return block_of(rows_, key); }
  AttendedRows after(int64_t key) const {
    return key + block_ < rows_.count ? at(key + block_) : following_;
  }

 private:
  AttendedRows block_of(const AttendedRows& rows, int64_t key) const {
    return rows.slice(key, std::min(rows.count - key, block_));
  }

  AttendedRows rows_, following_;
  int64_t block_;
};

// Transposes so many tiles, one after another in place.
class Transposer {
 public:
  void start(uint32_t* at, int64_t tiles) { at_ = at, left_ = tiles; }
  int64_t left() const { return left_; }
  void operator()() {
    transpose_tile(at_);
    at_ += kHalfWords;
    --left_;
  }

 private:
  uint32_t* at_;
  int64_t left_ = 0;
};

// A row of results written by non-temporal stores: a copy of store_row for a width that is known.
template <class Rows, int kDim>
[[gnu::always_inline]] inline void store_row_as(const AttentionProblem& p, const float* in,
                                                void* out) {
  constexpr int64_t kBytes = kDim * sizeof(typename Rows::Scalar);
  if (!p.streams || std::is_same_v<Rows, HalfRows> || kBytes == 0 || kBytes % 64 != 0 ||
      reinterpret_cast<uintptr_t>(out) % 64 != 0)
    return store_row(p, in, out);
  char* to = static_cast<char*>(out);
  FASTVLP_UNROLL
  for (int64_t b = 0; b < kBytes; b += 64) {
    if constexpr (Rows::kParts == 3) {
      _mm512_stream_ps(reinterpret_cast<float*>(to + b), (__m512)load(in + b / 4));
    } else {
      const float* from = in + b / 2;
      _mm512_stream_si512(
          reinterpret_cast<__m512i*>(to + b),
          words_of(_mm512_cvtne2ps_pbh((__m512)load(from + kLanes), (__m512)load(from))));
    }
  }
}

// The rows of a block from their sums, [m][width] if `row_major`, else [width][m], times `factor`
// where there is one. `rows` is scratch for kLanes of them.
template <class Rows, int kDim>
void store_sums(const TileShape<Rows>& x, const WeightBlock& b, float* sums, const float* factor,
                bool row_major, float* rows, const AttentionOutput& out) {
  if (!row_major) return store_queries(x, b, sums, factor, rows, out);
  const OutputRows to = query_outputs(b.p, b.task, out);
  for (int64_t r = 0; r < b.queries; ++r, sums += x.padded_dim()) {
    for (int64_t d = 0; factor != nullptr && d < x.padded_dim(); d += kLanes)
      store(sums + d, load(sums + d) * factor[r]);
    store_row_as<Rows, kDim>(b.p, sums, to[b.first + r]);
  }
}

// Walks a block of weights [keys][m], two keys and 32 query rows a piece.
struct WeightPieces {
  int64_t rows, m;  // padded keys
  int64_t row = 0, column = 0;

  int64_t left() const { return rows / 2 * ((m - column) / kStepSide) - row / 2; }
  // Moves on to the next piece, and `pairs` to where its words along the keys go; `step` words
  // apart are those of a step.
  [[gnu::always_inline]] void next(uint32_t*& pairs, int64_t step) {
    pairs += kTile;
    if ((row += 2) % kStepDepth == 0) pairs += step - kTile * kTile;
    if (row == rows) row = 0, column += kStepSide;
  }
};

// The largest magnitude among floats. Parts of floats lose bits below 2^-110, and what is not
// finite or would round up to infinity is not split: where that may have happened, floats
// have to be multiplied as such.
class Magnitude {
 public:
  void see(Vec x) {
    const VecI magnitude = bits(absolute(x));
    most_ = magnitude > most_ ? magnitude : most_;
  }
  void see(const float* in, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) see(load(in + i));
  }
  // Rows of a tensor; `finite`: without what is not.
  template <class Rows>
  void include_rows(const AttendedRows& x, int64_t dim, bool finite) {
    for (int64_t r = 0; r < x.count; ++r) {
      const auto* row =
          static_cast<const typename Rows::Scalar*>(x.features.data) + x[r] * x.features.stride;
      for (int64_t d = 0; d < dim; d += kLanes) {
        const Vec v = Rows::load_some(row + d, dim - d);
        see(finite ? (absolute(v) < splat(__builtin_inff()) ? v : Vec{}) : v);
      }
    }
  }

  bool finite() const { return most() < __builtin_inff(); }
  bool small() const { return most() > 0.0f && most() < 0x1p-90f; }
  bool sound() const { return !small() && most() < 0x1p120f; }

 private:
  float most() const {
    return bits_to_float(static_cast<uint32_t>(_mm512_reduce_max_epi32((__m512i)most_)));
  }

  VecI most_ = {};
};

// Whether keys and values, and all that is finite of the queries and, in the backward pass, of
// their gradients, may be split into bf16 parts.
template <class Rows>
inline bool inputs_are_sound(const AttentionProblem& p, const AttentionTask& task, bool backward) {
  const auto sound = [&](const AttendedRows& rows, bool finite) {
    Magnitude magnitude;
    magnitude.include_rows<Rows>(rows, p.dim, finite);
    return magnitude.sound();
  };
  return sound(attended_rows(p, task, p.k), false) && sound(attended_rows(p, task, p.v), false) &&
         sound({query_rows(p, task, p.q), nullptr, task.queries}, true) &&
         (!backward || sound({query_rows(p, task, p.grad), nullptr, task.queries}, true));
}

}  // namespace

#endif
