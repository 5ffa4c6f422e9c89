// The forward pass of one attention task on AMX tiles.
#pragma once

#include "remainder.h"

#if defined(__AMX_BF16__)

namespace {

// For each block of query rows:
//
//   matmul (AMX)                     interleaved (SIMD)
//   logits of key block j            pack keys j + 1, row maxima of logits j - 1
//   ... until all logits are there, then
//   weights j times values j         softmax stage j + 1, pack values j + 1
//
// Each block of query rows packs the keys again: two blocks of them stay in L1, all would not.
template <class Rows, int kDim>
class TileForward {
  using Shape = TileShape<Rows>;

  // Keys of a block: so few that the packed ones under way stay in L1 and L2, but with many
  // queries enough that the sums, which do not, are read and written less often.
  static int64_t key_block(int64_t queries) {
    const int64_t few = Rows::kParts == 3 ? 32 : 64;
    return queries > 2 * kStepSide ? 2 * few : few;
  }

 public:
  struct Layout : ScratchLayout {
    Layout(const Shape& x, int64_t queries, int64_t keys) {
      const int64_t m = x.padded(queries < Shape::kQueryBlock ? queries : Shape::kQueryBlock);
      const int64_t block = key_block(queries), n = round_up(keys, block);
      row = take(kLanes * x.padded_dim());
      for (int64_t& at : packed) at = take(x.words(block, x.dim));
      query_columns = take(x.words(m, x.dim));
      logits = take(n * m);
      for (int64_t& at : weights) at = take(x.words(m, block));
      sums = take(x.padded_dim() * m);
      largest = take(m);
      reciprocal = take(m);
    }
    int64_t row, packed[2], query_columns, logits, weights[2], sums, largest, reciprocal;
  };

  TileForward(const AttentionProblem& p, const AttentionTask& task, const AttentionForward& out,
              float* scratch)
      : p_(p),
        task_(task),
        out_(out),
        x_(p.dim),
        at_(x_, task.queries, task.attended_keys),
        floats_(scratch),
        words_(reinterpret_cast<uint32_t*>(scratch)),
        keys_(p, task, p.k, tiled_, block_),
        values_(p, task, p.v, tiled_, block_) {}

  // False where the floats have to be multiplied as such: see Magnitude.
  bool run() {
    if (task_.next != nullptr) {
      prefetcher_.start(p_.dim, task_.attended_keys);
      prefetcher_.add({query_rows(p_, *task_.next, p_.q), nullptr, task_.next->queries});
    }
    for (int64_t first = 0; first < task_.queries; first += Shape::kQueryBlock)
      run_queries(block_at(x_, p_, task_, first));
    finish_streams();
    if constexpr (Rows::kParts == 3)
      return !sums_.small() && (sums_.finite() || inputs_are_sound<Rows>(p_, task_, false));
    return true;
  }

 private:
  void run_queries(const WeightBlock& b) {
    float *most = floats_ + at_.largest, *sum = floats_ + at_.reciprocal;
    for (int64_t i = 0; i < b.m; i += kLanes) {
      store(most + i, splat(kNegativeInfinity));
      store(sum + i, Vec{});
    }
    if (b.n > 0) {
      place_queries<Rows, false>(x_, query_rows(p_, task_, p_.q), b.first, b.queries, p_.scale < 0,
                                 words_ + at_.query_columns, nullptr);
      make_logits(tiled_of(b));
      remainder_.add_logits(b, logits(b, tiled_), most);
    }
    for (int64_t i = 0; i < b.m; i += kLanes) {
      const Vec logit = load(most + i) * b.factor;
      store(most + i, logit > splat(kNegativeInfinity) ? logit : Vec{});
    }
    if (b.n > 0) {
      add_values(tiled_of(b));
      remainder_.add_values(b, logits(b, tiled_), most, sum, floats_ + at_.sums, row_major_);
    } else {
      std::memset(floats_ + at_.sums, 0, x_.padded_dim() * b.m * 4);
    }
    for (int64_t i = 0; i < b.m; i += kLanes) {
      const Vec total = load(sum + i);
      store(sum + i, total > Vec{} ? 1.0f / total : total);
    }
    if constexpr (Rows::kParts == 3) sums_.see(floats_ + at_.sums, x_.padded_dim() * b.m);
    store_sums<Rows, kDim>(x_, b, floats_ + at_.sums, sum, row_major_, floats_ + at_.row, out_.out);
    const int64_t row = task_.head * p_.total_queries + task_.first_query + b.first;
    std::memcpy(out_.statistics + row, most, b.queries * 4);
    std::memcpy(out_.statistics + p_.heads * p_.total_queries + row, sum, b.queries * 4);
  }

  uint32_t* packed(int64_t key) const { return words_ + at_.packed[key / block_ % 2]; }
  uint32_t* weights(int64_t key) const { return words_ + at_.weights[key / block_ % 2]; }
  float* logits(const WeightBlock& b, int64_t key) const {
    return floats_ + at_.logits + key * b.m;
  }

  // Without the remainder keys.
  WeightBlock tiled_of(const WeightBlock& b) const {
    WeightBlock part = b;
    part.n = b.n < tiled_ ? b.n : tiled_;
    return part;
  }

  // Attended keys of the block that begins at `key`; those of them that any of the query rows may
  // attend to.
  int64_t count(int64_t key) const { return std::min(tiled_ - key, block_); }
  WeightBlock block_of(const WeightBlock& b, int64_t key) const {
    WeightBlock part = b;
    part.first_key = key;
    part.n = std::min(b.n - key, block_);
    return part;
  }

  // The largest logits of 32 query rows among up to 32 keys a piece.
  struct MaximaStage {
    float *logits, *largest;
    int64_t n, m, row = 0, column = 0;

    int64_t left() const {
      return (n - row + kStepSide - 1) / kStepSide * (m / kStepSide) - column / kStepSide;
    }

    void operator()() {
      const int64_t end = n - row < kStepSide ? n : row + kStepSide;
      float* most = largest + column;
      const float* s = logits + row * m + column;
      Vec first = load(most), second = load(most + kLanes);
      for (int64_t r = row; r < end; ++r, s += m) {
        first = max(load(s), first);
        second = max(load(s + kLanes), second);
      }
      store(most, first);
      store(most + kLanes, second);
      if ((column += kStepSide) == m) column = 0, row = end;
    }
  };

  void make_logits(const WeightBlock& b) {
    KeyPacker<Rows, kDim, true, false> pack;
    MaximaStage maxima_stage = {};
    const auto prepare = [&](int64_t key) {
      pack.start(x_, keys_.at(key), keys_.after(key), packed(key), nullptr);
      interleaver_.add(pack);
      prefetcher_.step(block_);
    };
    const auto find_maxima = [&](int64_t key) {
      const WeightBlock part = block_of(b, key);
      if (p_.causal) {
        stream_.finish();
        mask_causal(part, logits(b, key));
      }
      maxima_stage = {logits(b, key), floats_ + at_.largest, part.n, b.m};
      interleaver_.add(maxima_stage);
    };
    walk_keys(b.n, block_, interleaver_, prepare, [&](int64_t key) {
      if (key > 0) find_maxima(key - block_);
      multiply(packed(key), x_.padded(count(key)), words_ + at_.query_columns, b.m, x_.dim_steps(),
               logits(b, key), b.m, false);
    });
    find_maxima((b.n - 1) / block_ * block_);
    stream_.finish();
    interleaver_.finish();
  }

  // Exponentials relative to the largest logit of two keys and 32 query rows a piece, dropped ones
  // 0, and what they add to the sums.
  struct SoftmaxStage {
    const WeightBlock* b;
    WeightPieces at;
    float factor;
    const float *logits, *largest;
    float* sums;
    uint32_t* out;
    DropoutRow* drop;  // two, or null

    int64_t left() const { return at.left(); }

    void operator()() {
      if (at.row + 1 < b->n && drop == nullptr)
        compute<true>();
      else
        compute<false>();
      at.next(out, Shape::kStep);
    }

    template <bool whole>
    [[gnu::always_inline]] void compute() {
      const int64_t row = at.row, column = at.column, n = b->n, m = at.m;
      const float* s = logits + row * m + column;
      Vec w[2][2];
      if (!whole) w[0][0] = w[0][1] = w[1][0] = w[1][1] = Vec{};
      FASTVLP_UNROLL
      for (int h = 0; h < 2; ++h) {
        const Vec most = load(largest + column + h * kLanes);
        float* sum = sums + column + h * kLanes;
        if (whole || row < n) w[0][h] = exp2(load(s + h * kLanes) * factor - most);
        if (whole || row + 1 < n) w[1][h] = exp2(load(s + m + h * kLanes) * factor - most);
        store(sum, load(sum) + w[0][h] + w[1][h]);
      }
      if (!whole && drop != nullptr) drop_some(w);
      place_weights<Rows, false, true>(w, nullptr, out);
    }

    void drop_some(Vec w[2][2]) {
      for (int h = 0; h < 2; ++h) {
        if (at.row == 0) drop[h].start(*b, at.column + h * kLanes);
        for (int i = 0; i < 2 && at.row + i < b->n; ++i)
          w[i][h] = w[i][h] * drop[h].factor(*b, at.row + i);
      }
    }
  };

  void add_values(const WeightBlock& b) {
    KeyPacker<Rows, kDim, false, true> pack;
    Transposer transpose;
    DropoutRow drop[2];
    WeightBlock part = b;
    SoftmaxStage softmax_stage = {};
    const auto prepare = [&](int64_t key) {
      part.first_key = key;
      part.n = std::min(b.n - key, block_);
      softmax_stage = {&part,
                       {x_.padded(count(key)), b.m},
                       b.factor,
                       logits(b, key),
                       floats_ + at_.largest,
                       floats_ + at_.reciprocal,
                       weights(key),
                       p_.drop_below != 0 ? drop : nullptr};
      pack.start(x_, values_.at(key), values_.after(key), nullptr, packed(key));
      transpose.start(row_major_ ? weights(key) : packed(key),
                      x_.tiles(x_.words(row_major_ ? b.m : p_.dim, count(key))));
      interleaver_.add(softmax_stage);
      interleaver_.add(pack);
      interleaver_.add(transpose);
    };
    float* sums = floats_ + at_.sums;
    walk_keys(b.n, block_, interleaver_, prepare, [&](int64_t key) {
      const int64_t steps = x_.steps(count(key));
      if (row_major_)
        multiply(weights(key), b.m, packed(key), x_.padded_dim(), steps, sums, x_.padded_dim(),
                 key > 0);
      else
        multiply(packed(key), x_.padded_dim(), weights(key), b.m, steps, sums, b.m, key > 0);
    });
    stream_.finish();
  }

  void multiply(const uint32_t* a, int64_t m, const uint32_t* b, int64_t n, int64_t steps, float* c,
                int64_t ldc, bool accumulate) {
    interleaver_.spread(m / kStepSide * (n / kStepSide) * steps * Shape::kCalls);
    stream_.multiply(a, m, b, n, steps, c, ldc, accumulate, interleaver_);
    interleaver_.finish();
  }

  const AttentionProblem& p_;
  const AttentionTask& task_;
  const AttentionForward& out_;
  const Shape x_;
  const Layout at_;
  float* const floats_;
  uint32_t* const words_;
  const int64_t tiled_ = tiled_keys(p_, task_);
  const RemainderKeys<Rows, kDim> remainder_{p_, task_, tiled_};
  const int64_t block_ = key_block(task_.queries);
  const KeyBlocks keys_, values_;
  const bool row_major_ = Shape::sums_row_major(task_.queries);
  const TileSession session_;
  Prefetcher prefetcher_;
  Interleaver interleaver_;
  BlockStream<Rows> stream_;
  Magnitude sums_;
};

}  // namespace

#endif
