// The backward pass of one attention task of bfloat16 and at most 32 query rows on AMX tiles, with
// unpacked keys and values.
#pragma once

#include "unpacked.h"

#if defined(__AMX_BF16__)

namespace {

// Walks units of sixteen keys, so few that all under way stays in L1. At unit i:
//
//   matmul (AMX)                                   interleaved (SIMD)
//   logits i, gradients w.r.t. the weights i       store stage: gradients of keys i - 2
//   gradients of keys and values i - 1             softmax stage i
//
// Gradients w.r.t. logits are kept, joined along the keys, for a second walk that adds up the
// gradients of queries in tiles.
template <int kDim>
class UnpackedBackward {
  static_assert(kDim == 64, "the sums of a unit are four tiles");
  using Shape = TileShape<BFloat16Rows>;
  static constexpr int64_t kUnit = kTile;
  static constexpr int kPieces = kUnit / 2;  // two keys each
  static constexpr int64_t kPrefetchDistance =
      6;  // units from the softmax stage's to those fetched

 public:
  static constexpr int64_t kMostQueries = kStepSide;

  struct Layout : ScratchLayout {
    explicit Layout(int64_t keys) {
      for (int64_t& at : columns) at = take(kStepSide * kDim / 2);
      for (int64_t& at : rows) at = take(kStepSide * kDim / 2);
      scores = take(2 * kUnit * kStepSide);
      weight_rows = take(kHalfWords);
      gradient_rows = take(kHalfWords);
      pairs = take(kPartWords);
      dv = take(kUnit * kDim);
      key_copy = take(kStepSide * kDim / 2);
      value_copy = take(kStepSide * kDim / 2);
      for (int64_t& at : joined) at = take(kPartWords);
      sums = take(kStepSide * kDim);
      ordered = take(kStepSide * kDim);
      largest = take(kStepSide);
      reciprocal = take(kStepSide);
      delta = take(kStepSide);
      gradients = take(round_up(keys, kStepSide) / kStepSide * kPartWords);
    }
    // columns and rows: of the queries and of their gradients; scores: of a unit, then its
    // keys' gradients
    int64_t columns[2], rows[2], scores, weight_rows, gradient_rows, pairs, dv, key_copy,
        value_copy, joined[2], sums, ordered, largest, reciprocal, delta, gradients;
  };

  UnpackedBackward(const AttentionProblem& p, const AttentionTask& task,
                   const AttentionBackward& out, float* scratch)
      : p_(p),
        task_(task),
        out_(out),
        at_(task.attended_keys),
        floats_(scratch),
        words_(reinterpret_cast<uint32_t*>(scratch)),
        keys_(p, task, p.k, tiled_),
        values_(p, task, p.v, tiled_) {}

  void run() {
    prefetch_next_task(p_, task_, out_, prefetcher_);
    run_prefetcher_.start(p_, task_);
    const WeightBlock b = {p_, task_, 0, task_.queries, kStepSide, 0, tiled_, logit_factor(p_)};
    if (task_.queries > 0) {
      if (task_.attended_keys > 0) prepare_queries();
      if (p_.drop_below != 0)
        walk<true>(b);
      else
        walk<false>(b);
      add_query_gradients();
      remainder_.run_backward(x_, out_, true, [&](int64_t) {
        return typename RemainderKeys<BFloat16Rows, kDim>::QueryBlock{
            floats_ + at_.largest, floats_ + at_.reciprocal, floats_ + at_.delta,
            floats_ + at_.ordered};
      });
      store_sums<BFloat16Rows, kDim>(x_, b, floats_ + at_.ordered, nullptr, true, nullptr, out_.dq);
    }
    clear_masked(p_, task_, out_.dk);
    clear_masked(p_, task_, out_.dv);
    finish_streams();
  }

 private:
  void prepare_queries() {
    place_queries<BFloat16Rows, true>(x_, query_rows(p_, task_, p_.q), 0, task_.queries,
                                      p_.scale < 0, words_ + at_.columns[0], words_ + at_.rows[0]);
    place_queries<BFloat16Rows, true>(x_, query_rows(p_, task_, p_.grad), 0, task_.queries, false,
                                      words_ + at_.columns[1], words_ + at_.rows[1]);
    const int64_t row = task_.head * p_.total_queries + task_.first_query;
    float *largest = floats_ + at_.largest, *reciprocal = floats_ + at_.reciprocal;
    std::memset(largest, 0, kStepSide * 4);
    std::memset(reciprocal, 0, kStepSide * 4);  // padding: weights 0
    std::memcpy(largest, out_.statistics + row, task_.queries * 4);
    std::memcpy(reciprocal, out_.statistics + p_.heads * p_.total_queries + row, task_.queries * 4);
    compute_delta();
  }

  // delta, the sum over the keys of each weight times the gradient w.r.t. it, is the dot product of
  // the output and the gradient w.r.t. it. By the matmul that gives the gradients w.r.t. weights,
  // so that a weight of 1 has a gradient of 0 and not of rounding.
  void compute_delta() {
    const RowBlocks<kDim> out({query_rows(p_, task_, out_.out), nullptr, task_.queries});
    float* delta = floats_ + at_.delta;
    for (int64_t half = 0; half < 2; ++half) {
      const RowBlock rows = out.block(half * kTile, kTile, words_ + at_.key_copy);
      multiply_scores(rows, rows, [](int) {});
      finish();
      const float* derivatives = floats_ + at_.scores + kUnit * kStepSide;
      for (int64_t i = 0; i < kTile; ++i)
        delta[half * kTile + i] = derivatives[i * kStepSide + half * kTile + i];
    }
  }

  // The weights of a unit and their gradients, scale * weight (t - delta), two keys at a time, as
  // rows along the queries and the gradients joined along the keys. Fetches rows to come.
  template <bool kDrop>
  struct SoftmaxStage {
    WeightBlock part;
    float scale;
    Vec largest[2], reciprocal[2], delta[2];
    DropoutRow* drop;
    const float* scores;
    uint32_t *weights, *gradients, *pairs;
    RowBlock near_keys, near_values, next_keys, next_values;
    RunPrefetcher<kDim>* run;
    int left = 0;

    [[gnu::always_inline]] void operator()(int count) {
      for (; count > 0 && left > 0; --count, --left) {
        Vec w[2][2], g[2][2];
        FASTVLP_UNROLL
        for (int h = 0; h < 2; ++h) {
          FASTVLP_UNROLL
          for (int i = 0; i < 2; ++i) {
            const float* at = scores + i * kStepSide + h * kLanes;
            w[i][h] = exp2(load(at) * part.factor - largest[h]) * reciprocal[h];
            g[i][h] = load(at + kUnit * kStepSide);
          }
        }
        if constexpr (kDrop) {
          apply_dropout(w, g);
        } else {
          FASTVLP_UNROLL
          for (int h = 0; h < 2; ++h) {
            FASTVLP_UNROLL
            for (int i = 0; i < 2; ++i) g[i][h] = w[i][h] * (g[i][h] - delta[h]) * scale;
          }
        }
        _mm512_store_si512(weights, bf16_row(w[0][0], w[0][1]));
        _mm512_store_si512(weights + kTile, bf16_row(w[1][0], w[1][1]));
        const __m512i low = bf16_row(g[0][0], g[0][1]), high = bf16_row(g[1][0], g[1][1]);
        _mm512_store_si512(gradients, low);
        _mm512_store_si512(gradients + kTile, high);
        store_joined(low, high, pairs);
        prefetch_rows<kDim, 3>(near_keys);
        prefetch_rows<kDim, 3>(near_values);
        prefetch_rows<kDim, 2>(next_keys);
        prefetch_rows<kDim, 2>(next_values);
        (*run)();
        scores += 2 * kStepSide, weights += 2 * kTile, gradients += 2 * kTile, pairs += kTile;
        near_keys.advance(2), near_values.advance(2);
        next_keys.advance(2), next_values.advance(2);
      }
    }

   private:
    void apply_dropout(Vec w[2][2], Vec g[2][2]) {
      const int64_t key = 2 * (kPieces - left);
      for (int h = 0; h < 2; ++h)
        for (int i = 0; i < 2; ++i) {
          const Vec keep = key + i < part.n ? drop[h].factor(part, key + i) : Vec{};
          g[i][h] = w[i][h] * (g[i][h] * keep - delta[h]) * scale;
          w[i][h] = w[i][h] * keep;
        }
    }
  };

  // Stores the gradients of a unit's keys, two a piece.
  struct StoreStage {
    const UnpackedBackward& pass;
    const OutputRows dk, dv;
    const bool streams;  // whole lines, past the caches
    int64_t key = 0, left = 0;

    explicit StoreStage(const UnpackedBackward& p)
        : pass(p),
          dk(key_outputs(p.p_, p.task_, p.out_.dk)),
          dv(key_outputs(p.p_, p.task_, p.out_.dv)),
          streams(p.p_.streams &&
                  (reinterpret_cast<uintptr_t>(dk.data) | reinterpret_cast<uintptr_t>(dv.data) |
                   static_cast<uintptr_t>(dk.step | dv.step)) %
                          64 ==
                      0) {}

    [[gnu::always_inline]] void operator()(int count) {
      for (; count > 0 && left > 0; --count)
        for (int64_t end = left > 2 ? left - 2 : 0; left > end; --left, ++key) {
          const int64_t row = pass.task_.key(key);
          const float* from = pass.floats_ + key % kUnit * kDim;
          store(from + pass.at_.dv, static_cast<uint16_t*>(dv[row]));
          store(from + pass.at_.scores, static_cast<uint16_t*>(dk[row]));
        }
    }

   private:
    [[gnu::always_inline]] void store(const float* from, uint16_t* to) const {
      FASTVLP_UNROLL
      for (int64_t d = 0; d < kDim; d += kStepSide) {
        const __m512i words = bf16_row(load(from + d), load(from + d + kLanes));
        if (streams)
          _mm512_stream_si512(reinterpret_cast<__m512i*>(to + d), words);
        else
          _mm512_storeu_si512(to + d, words);
      }
    }
  };

  template <bool kDrop>
  void walk(const WeightBlock& b) {
    DropoutRow drop[2];
    for (int h = 0; h < 2 && kDrop; ++h) drop[h].start(b, h * kLanes);
    SoftmaxStage<kDrop> softmax_stage = {b,    p_.scale, {},      {},      {},
                                         drop, nullptr,  nullptr, nullptr, nullptr,
                                         {},   {},       {},      {},      &run_prefetcher_};
    for (int h = 0; h < 2; ++h) {
      softmax_stage.largest[h] = load(floats_ + at_.largest + h * kLanes);
      softmax_stage.reciprocal[h] = load(floats_ + at_.reciprocal + h * kLanes);
      softmax_stage.delta[h] = load(floats_ + at_.delta + h * kLanes);
    }
    const int64_t n = (tiled_ + kUnit - 1) / kUnit;
    StoreStage store_stage(*this);
    for (int64_t i = 0; i <= n && n > 0; ++i) {
      // Scores of unit i, gradients of the keys of the one before; those of the one before that are
      // stored.
      store_stage.left = i >= 2 ? kUnit : 0;
      if (i < n)
        multiply_scores(keys_.block(i * kUnit, kUnit, words_ + at_.key_copy),
                        values_.block(i * kUnit, kUnit, words_ + at_.value_copy), store_stage);
      else
        finish();
      store_stage(kPieces);
      if (i > 0 && i % 2 == 0) keep_gradients(i / 2 - 1);
      if (i < n) {
        start(softmax_stage, i, n);
        if (p_.causal || softmax_stage.part.n < kUnit) {
          finish();
          hide_logits(softmax_stage.part, kUnit, floats_ + at_.scores);
        }
      }
      if (i > 0)
        add_key_gradients(softmax_stage);
      else
        finish();
      softmax_stage(kPieces);
      prefetcher_.step(kUnit);
    }
    finish();
    store_stage.left = tiled_ - store_stage.key;
    store_stage(kPieces);
    if (n % 2 != 0) {
      uint32_t* none = words_ + at_.pairs + kHalfWords / 2;
      for (int64_t half = 0; half < 2; ++half)
        std::memset(none + half * kHalfWords, 0, kHalfWords * 2);
      keep_gradients(n / 2);
    }
  }

  template <class Stage>
  void start(Stage& stage, int64_t unit, int64_t units) const {
    stage.left = kPieces;
    stage.part.first_key = unit * kUnit;
    stage.part.n = std::min(tiled_ - unit * kUnit, kUnit);
    stage.scores = floats_ + at_.scores;
    stage.weights = words_ + at_.weight_rows;
    stage.gradients = words_ + at_.gradient_rows;
    stage.pairs = words_ + at_.pairs + unit % 2 * (kHalfWords / 2);
    const int64_t distant = (unit + kPrefetchDistance) * kUnit, end = units * kUnit;
    stage.near_keys = keys_.to_prefetch((unit + 1) * kUnit, kUnit, end);
    stage.near_values = values_.to_prefetch((unit + 1) * kUnit, kUnit, end);
    stage.next_keys = keys_.to_prefetch(distant, kUnit, end);
    stage.next_values = values_.to_prefetch(distant, kUnit, end);
  }

  // The gradients of 32 keys' logits as the left operand of sums over keys.
  void keep_gradients(int64_t block) const {
    const uint32_t* pairs = words_ + at_.pairs;
    uint32_t* to = words_ + at_.gradients + block * kPartWords;
    for (int64_t half = 0; half < 2; ++half)
      transpose_tile(pairs + half * kHalfWords, to + half * kHalfWords);
  }

  // Logits of sixteen keys and gradients w.r.t. their weights. Begins by storing what the
  // tiles hold, which `work` may then use.
  template <class Work>
  [[gnu::always_inline]] void multiply_scores(const RowBlock& k, const RowBlock& v, Work&& work) {
    compiler_barrier(words_);
    const uint32_t *q = words_ + at_.columns[0], *grad = words_ + at_.columns[1];
    _tile_loadd(4, k.data, k.stride * 2);
    load_columns(q);
    replace<0>();
    _tile_dpbf16ps(0, 4, 6);
    replace<1>();
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, v.data, v.stride * 2);
    load_columns(grad);
    replace<2>();
    _tile_dpbf16ps(2, 5, 6);
    replace<3>();
    _tile_dpbf16ps(3, 5, 7);
    compiler_barrier(words_);
    work(kPieces / 4);
    _tile_loadd(4, k.data + kStepSide, k.stride * 2);
    load_columns(q + kPartWords);
    _tile_dpbf16ps(0, 4, 6);
    work(kPieces / 4);
    _tile_dpbf16ps(1, 4, 7);
    work(kPieces / 4);
    _tile_loadd(5, v.data + kStepSide, v.stride * 2);
    load_columns(grad + kPartWords);
    _tile_dpbf16ps(2, 5, 6);
    work(kPieces / 4);
    _tile_dpbf16ps(3, 5, 7);
    float *s = floats_ + at_.scores, *t = s + kUnit * kStepSide;
    held_ = {{s, s + kTile, t, t + kTile}, kStepSide};
  }

  // Gradients of sixteen keys from their weights and gradients of logits. As before, `work` may use
  // what the tiles held.
  template <class Work>
  [[gnu::always_inline]] void add_key_gradients(Work&& work) {
    compiler_barrier(words_);
    const uint32_t *q = words_ + at_.rows[0], *grad = words_ + at_.rows[1];
    _tile_loadd(4, words_ + at_.weight_rows, 64);
    _tile_loadd(5, words_ + at_.gradient_rows, 64);
    load_columns(grad);
    replace<0>();
    _tile_dpbf16ps(0, 4, 6);
    replace<1>();
    _tile_dpbf16ps(1, 4, 7);
    load_columns(grad + kPartWords);
    replace<2>();
    _tile_dpbf16ps(2, 4, 6);
    replace<3>();
    _tile_dpbf16ps(3, 4, 7);
    compiler_barrier(words_);
    work(kPieces / 4);
    held_ = row_of_tiles(floats_ + at_.dv);
    load_columns(q);
    replace<0>();
    _tile_dpbf16ps(0, 5, 6);
    work(kPieces / 8);
    replace<1>();
    _tile_dpbf16ps(1, 5, 7);
    work(kPieces / 8);
    load_columns(q + kPartWords);
    replace<2>();
    _tile_dpbf16ps(2, 5, 6);
    work(kPieces / 8);
    replace<3>();
    _tile_dpbf16ps(3, 5, 7);
    compiler_barrier(words_);
    held_ = row_of_tiles(floats_ + at_.scores);
  }

  // The second walk over the keys, once for each half of their width.
  void add_query_gradients() {
    const int64_t blocks = (tiled_ + kStepSide - 1) / kStepSide;
    for (int64_t d = 0; d < kDim; d += kStepSide) {
      float* sums = floats_ + at_.sums + d;
      for (int64_t block = 0; block < blocks; ++block) {
        uint32_t* keys = words_ + at_.joined[block % 2];
        const RowBlock rows = keys_.block(block * kStepSide, kStepSide, words_ + at_.key_copy);
        for (int64_t r = 0; r < kStepSide; r += 2)
          join_rows<kStepSide>(rows[r] + d, rows[r + 1] + d, keys + r / 2 * kTile);
        compiler_barrier(words_);
        const uint32_t* gradients = words_ + at_.gradients + block * kPartWords;
        _tile_loadd(4, gradients, 64);
        load_columns(keys);
        _tile_loadd(5, gradients + kHalfWords, 64);
        if (block == 0) start_block<2, 2>(nullptr, 0, false);
        multiply_tiles<2, 2>();
      }
      if (blocks > 0) store_block<2, 2>(sums, kDim);
      compiler_barrier(sums);
    }
    if (blocks > 0)
      order_sums<kDim>(floats_ + at_.sums, floats_ + at_.ordered);
    else
      std::memset(floats_ + at_.ordered, 0, kStepSide * kDim * 4);
  }

  // What tiles 0 to 3 hold goes here, in rows `row` floats apart; nowhere if c[0] is null.
  struct Held {
    float* c[4];
    int64_t row;
  };
  static Held row_of_tiles(float* c) {
    return {{c, c + kTile, c + 2 * kTile, c + 3 * kTile}, kDim};
  }

  static void load_columns(const uint32_t* b) {
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kHalfWords, 64);
  }

  // Stores a tile and restarts it, while others are multiplied.
  template <int tile>
  [[gnu::always_inline]] void replace() const {
    if (held_.c[0] != nullptr) store_tile<tile>(held_.c[tile], held_.row);
    zero_tile<tile>();
  }

  void finish() {
    if (held_.c[0] != nullptr) replace<0>(), replace<1>(), replace<2>(), replace<3>();
    held_.c[0] = nullptr;
    compiler_barrier(words_);
  }

  const AttentionProblem& p_;
  const AttentionTask& task_;
  const AttentionBackward& out_;
  const Shape x_{kDim};
  const Layout at_;
  float* const floats_;
  uint32_t* const words_;
  const int64_t tiled_ = tiled_keys(p_, task_);
  const RemainderKeys<BFloat16Rows, kDim> remainder_{p_, task_, tiled_};
  const RowBlocks<kDim> keys_, values_;
  const TileSession session_;
  Held held_ = {};
  Prefetcher prefetcher_;
  RunPrefetcher<kDim> run_prefetcher_;
};

}  // namespace

#endif
