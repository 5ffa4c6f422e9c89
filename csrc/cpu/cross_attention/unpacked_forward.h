// The forward pass of one attention task of bfloat16 on AMX tiles, with unpacked keys.
#pragma once

#include "unpacked.h"

#if defined(__AMX_BF16__)

namespace {

// For each block of 32 query rows one walk over blocks of 32 keys. At key block j:
//
//   matmul (AMX)                        interleaved (SIMD)
//   logits j, weights j - 2 times       softmax stage j - 1, join values j - 1
//   values j - 2
//
// All of it stays in L1. Weights are relative to the largest logit of
// some block before; only where a logit is far above that are sums scaled down.
template <int kDim>
class UnpackedForward {
  static_assert(kDim % kStepSide == 0);
  using Shape = TileShape<BFloat16Rows>;
  static constexpr int64_t kBlock = kStepSide;
  static constexpr int kPieces = kBlock / 2;                       // two keys each
  static constexpr int kShare = kPieces / 2 / (kDim / kStepSide);  // pieces per step of a matmul
  static constexpr int64_t kPrefetchDistance =
      3;  // blocks from the softmax stage's to those fetched
  // By how much a logit in units of ln 2 may be above what weights are relative to.
  static constexpr float kSlack = 8.0f;
  static constexpr float kLowest = -3.0e38f;

 public:
  struct Layout : ScratchLayout {
    Layout() {
      query_columns = take(kStepSide * kDim / 2);
      for (int64_t& at : logits) at = take(kBlock * kStepSide);
      for (int64_t& at : weights) at = take(kPartWords);
      for (int64_t& at : values) at = take(kBlock * kDim / 2);
      sums = take(kStepSide * kDim);
      key_copy = take(kBlock * kDim / 2);
      value_copy = take(kBlock * kDim / 2);
      ordered = take(kStepSide * kDim);
      remainder = take(kMaxRemainderKeys * kStepSide);
      largest = take(kStepSide);
      scale = take(kStepSide);
      reciprocal = take(kStepSide);
    }
    int64_t query_columns, logits[2], weights[2], values[2], sums, key_copy, value_copy, ordered,
        remainder, largest, scale, reciprocal;
  };

  UnpackedForward(const AttentionProblem& p, const AttentionTask& task, const AttentionForward& out,
                  float* scratch)
      : p_(p),
        task_(task),
        out_(out),
        floats_(scratch),
        words_(reinterpret_cast<uint32_t*>(scratch)),
        keys_(p, task, p.k, tiled_),
        values_(p, task, p.v, tiled_) {}

  void run() {
    if (task_.next != nullptr) {
      prefetcher_.start(p_.dim,
                        round_up(task_.queries, kStepSide) / kStepSide * task_.attended_keys);
      prefetcher_.add({query_rows(p_, *task_.next, p_.q), nullptr, task_.next->queries});
    }
    for (int64_t first = 0; first < task_.queries; first += kStepSide) run_queries(first);
    finish_streams();
  }

 private:
  // What weights of a block of query rows are relative to, and their sums.
  struct Softmax {
    Vec largest[2], total[2];
  };

  void run_queries(int64_t first) {
    const int64_t queries = std::min(task_.queries - first, kStepSide);
    const WeightBlock b = {p_,
                           task_,
                           first,
                           queries,
                           kStepSide,
                           0,
                           visible(p_, task_, first + queries),
                           logit_factor(p_)};
    float *largest = floats_ + at_.largest, *total = floats_ + at_.reciprocal;
    for (int64_t i = 0; i < kStepSide; i += kLanes) store(largest + i, splat(kNegativeInfinity));
    place_queries<BFloat16Rows, false>(x_, query_rows(p_, task_, p_.q), first, queries,
                                       p_.scale < 0, words_ + at_.query_columns, nullptr);
    remainder_.add_logits(b, floats_ + at_.remainder, largest);
    Softmax s;
    for (int h = 0; h < 2; ++h) {
      s.largest[h] = max(load(largest + h * kLanes) * b.factor, splat(kLowest));
      s.total[h] = Vec{};
    }
    if (p_.drop_below != 0)
      walk<true>(b, s);
    else
      walk<false>(b, s);
    for (int h = 0; h < 2; ++h) {
      store(largest + h * kLanes, s.largest[h]);
      store(total + h * kLanes, s.total[h]);
    }
    float* sums = floats_ + at_.ordered;
    remainder_.add_values(b, floats_ + at_.remainder, largest, total, sums, true);
    for (int64_t i = 0; i < kStepSide; i += kLanes) {
      const Vec sum = load(total + i), most = load(largest + i);
      store(largest + i, most > splat(kLowest) ? most : Vec{});
      store(total + i, sum > Vec{} ? 1.0f / sum : sum);
    }
    store_sums<BFloat16Rows, kDim>(x_, b, sums, total, true, nullptr, out_.out);
    const int64_t row = task_.head * p_.total_queries + task_.first_query + first;
    std::memcpy(out_.statistics + row, largest, queries * 4);
    std::memcpy(out_.statistics + p_.heads * p_.total_queries + row, total, queries * 4);
  }

  float* logits(int64_t block) const { return floats_ + at_.logits[block % 2]; }
  uint32_t* weights(int64_t block) const { return words_ + at_.weights[block % 2]; }
  uint32_t* values(int64_t block) const { return words_ + at_.values[block % 2]; }

  // A block's weights, two keys at a time: computed from logits, dropped ones 0, and joined as
  // words, and their values. Fetches rows to come.
  template <bool kDrop>
  struct SoftmaxStage {
    const WeightBlock& part;
    Softmax& softmax;
    DropoutRow* drop;
    const float* logits;
    uint32_t *weights, *values;
    RowBlock rows, near_keys, next_keys, next_values;
    int left = 0;

    [[gnu::always_inline]] void operator()(int count) {
      for (; count > 0 && left > 0; --count, --left) {
        Vec w[2][2];
        make(w);
        if constexpr (kDrop) drop_some(w);
        store_joined(bf16_row(w[0][0], w[0][1]), bf16_row(w[1][0], w[1][1]), weights);
        join_rows<kDim>(rows[0], rows[1], values);
        prefetch_rows<kDim, 3>(near_keys);
        prefetch_rows<kDim, 2>(next_keys);
        prefetch_rows<kDim, 2>(next_values);
        logits += 2 * kStepSide, weights += kTile, values += kTile;
        rows.advance(2), near_keys.advance(2), next_keys.advance(2), next_values.advance(2);
      }
    }

   private:
    [[gnu::always_inline]] void make(Vec w[2][2]) {
      FASTVLP_UNROLL
      for (int h = 0; h < 2; ++h) {
        FASTVLP_UNROLL
        for (int i = 0; i < 2; ++i)
          w[i][h] =
              exp2(load(logits + i * kStepSide + h * kLanes) * part.factor - softmax.largest[h]);
        softmax.total[h] = softmax.total[h] + (w[0][h] + w[1][h]);
      }
    }
    void drop_some(Vec w[2][2]) const {
      const int64_t key = 2 * (kPieces - left);
      for (int h = 0; h < 2; ++h)
        for (int i = 0; i < 2 && key + i < part.n; ++i)
          w[i][h] = w[i][h] * drop[h].factor(part, key + i);
    }
  };

  // Leaves the sums of values, in order, in `ordered`.
  template <bool kDrop>
  void walk(const WeightBlock& b, Softmax& result) {
    const int64_t keys = std::min(b.n, tiled_), blocks = (keys + kBlock - 1) / kBlock;
    DropoutRow drop[2];
    for (int h = 0; h < 2 && kDrop; ++h) drop[h].start(b, h * kLanes);
    Softmax s = result;
    WeightBlock part = b;
    SoftmaxStage<kDrop> softmax_stage = {part, s, drop, nullptr, nullptr, nullptr, {}, {}, {}, {}};
    for (int64_t j = 0; j < blocks + 2 && blocks > 0; ++j) {
      // Logits of block j, softmax stage of the one before it, sums of the one before that.
      bool add = j >= 2;
      if (j > 0 && j <= blocks) {
        part.first_key = (j - 1) * kBlock;
        part.n = std::min(keys - part.first_key, kBlock);
        start(softmax_stage, b, j - 1, blocks);
        hide_logits(part, kBlock, logits(j - 1));
        if (raise(logits(j - 1), b.factor, s) && add) {
          add_values(j - 2, [](int) {});
          finish();
          scale_sums();
          add = false;
        }
      }
      if (j < blocks)
        multiply_logits(keys_.block(j * kBlock, kBlock, words_ + at_.key_copy), j, softmax_stage);
      if (add)
        add_values(j - 2, softmax_stage);
      else
        finish();
      softmax_stage(kPieces);
      if (j == 0 || j > blocks) continue;
      transpose_tile(weights(j - 1));
      transpose_tile(weights(j - 1) + kHalfWords);
      prefetcher_.step(kBlock);
    }
    finish();
    if (blocks > 0)
      order_sums<kDim>(floats_ + at_.sums, floats_ + at_.ordered);
    else
      std::memset(floats_ + at_.ordered, 0, kStepSide * kDim * 4);
    result = s;
  }

  template <class Stage>
  void start(Stage& stage, const WeightBlock& b, int64_t block, int64_t blocks) const {
    stage.left = kPieces;
    stage.logits = logits(block);
    stage.weights = weights(block);
    stage.values = values(block);
    stage.rows = values_.block(block * kBlock, kBlock, words_ + at_.value_copy);
    stage.near_keys = stage.next_keys = stage.next_values = {stage.rows.data, 0};
    const int64_t end = blocks * kBlock, near = (block + 2) * kBlock;
    stage.near_keys = keys_.to_prefetch(near, kBlock, end);
    const int64_t distant = (block + kPrefetchDistance) * kBlock;
    if (distant < end ? b.first > 0 : b.first + b.queries < task_.queries) return;
    stage.next_keys = keys_.to_prefetch(distant, kBlock, end);
    stage.next_values = values_.to_prefetch(distant, kBlock, end);
  }

  // Whether weights have to be relative to larger logits than before; then `scale` is what sums so
  // far are to be multiplied by.
  bool raise(const float* logits, float factor, Softmax& s) {
    Vec most[2][2] = {{load(logits), load(logits + kLanes)},
                      {load(logits + kStepSide), load(logits + kStepSide + kLanes)}};
    for (int64_t r = 2; r < kBlock; r += 2)
      for (int i = 0; i < 2; ++i)
        for (int h = 0; h < 2; ++h)
          most[i][h] = max(load(logits + (r + i) * kStepSide + h * kLanes), most[i][h]);
    bool raised = false;
    for (int h = 0; h < 2; ++h) {
      most[0][h] = max(most[0][h], most[1][h]) * factor;
      raised |=
          _mm512_cmp_ps_mask((__m512)most[0][h], (__m512)(s.largest[h] + kSlack), _CMP_GT_OQ) != 0;
    }
    if (!raised) return false;
    for (int h = 0; h < 2; ++h) {
      const Vec largest = max(most[0][h], s.largest[h]);
      const Vec scale = exp2(s.largest[h] - largest);
      s.total[h] = s.total[h] * scale;
      s.largest[h] = largest;
      store(floats_ + at_.scale + h * kLanes, scale);
    }
    return true;
  }

  void scale_sums() {
    float* sums = floats_ + at_.sums;
    for (int64_t r = 0; r < kStepSide; ++r)
      for (int64_t d = 0; d < kDim; d += kLanes, sums += kLanes)
        store(sums, load(sums) * floats_[at_.scale + joined_at(r)]);
  }

  template <class Work>
  [[gnu::always_inline]] void multiply_logits(const RowBlock& a, int64_t block, Work&& work) {
    compiler_barrier(a.data);
    const uint32_t* b = words_ + at_.query_columns;
    const BlockTarget c = {logits(block), kStepSide};
    for (int64_t d = 0; d < kDim; d += kStepSide, b += kPartWords) {
      _tile_loadd(4, a.data + d, a.stride * 2);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + kHalfWords, 64);
      _tile_loadd(5, a[kTile] + d, a.stride * 2);
      if (d == 0)
        restart_block(last_, c, false);
      else
        multiply_tiles<2, 2>();
      work(kShare);
    }
    last_ = c;
  }

  template <class Work>
  [[gnu::always_inline]] void add_values(int64_t block, Work&& work) {
    compiler_barrier(words_);
    for (int64_t d = 0; d < kDim; d += kStepSide) {
      const BlockTarget c = {floats_ + at_.sums + d, kDim};
      multiply_step(weights(block), values(block) + d * kTile, last_, c, block > 0);
      work(kShare);
    }
  }

  void finish() {
    if (last_.c != nullptr) store_block<2, 2>(last_.c, last_.row);
    last_.c = nullptr;
    compiler_barrier(floats_);
  }

  const AttentionProblem& p_;
  const AttentionTask& task_;
  const AttentionForward& out_;
  const Shape x_{kDim};
  const Layout at_;
  float* const floats_;
  uint32_t* const words_;
  const int64_t tiled_ = tiled_keys(p_, task_);
  const RemainderKeys<BFloat16Rows, kDim> remainder_{p_, task_, tiled_};
  const RowBlocks<kDim> keys_, values_;
  const TileSession session_;
  BlockTarget last_ = {nullptr, 0};
  Prefetcher prefetcher_;
};

}  // namespace

#endif
