// The backward pass of one attention task on AMX tiles.
#pragma once

#include "remainder.h"

#if defined(__AMX_BF16__)

namespace {

// A block of keys and one of query rows.
struct AttentionPair {
  int64_t key = -1;  // of the attended ones; -1: no pair
  int64_t query = 0;
  bool starts = false, ends = false;  // the pairs of these keys
  int64_t number = 0;
};

// Walks blocks of keys and for each the blocks of query rows that attend to it. Pairs overlap;
// at pair i:
//
//   matmul (AMX)                                   interleaved (SIMD)
//   logits i, gradients w.r.t. the weights i       pack the next keys and values
//   gradients of keys and values i - 1             softmax stage i
//   gradients of queries i - 1                     store stage: gradients of keys that are complete
template <class Rows, int kDim>
class TileBackward {
  using Shape = TileShape<Rows>;

  // So few that the packed ones under way stay in L1 and L2.
  static constexpr int64_t kKeyBlock = Rows::kParts == 3 ? 32 : 64;

 public:
  // The operands of one block of query rows, offsets from its first word.
  struct QueryLayout : ScratchLayout {
    QueryLayout(const Shape& x, int64_t m) {
      query_columns = take(x.words(m, x.dim));
      grad_columns = take(x.words(m, x.dim));
      query_rows = take(x.words(x.dim, m));
      grad_rows = take(x.words(x.dim, m));
      sums = take(x.padded_dim() * m);
      largest = take(m);
      reciprocal = take(m);
      delta = take(m);
    }
    int64_t query_columns, grad_columns, query_rows, grad_rows, sums, largest, reciprocal, delta;
  };

  struct Layout : ScratchLayout {
    Layout(const Shape& x, int64_t queries)
        : m(x.padded(queries < Shape::kQueryBlock ? queries : Shape::kQueryBlock)), block(x, m) {
      const int64_t n = kKeyBlock;
      row = take(kLanes * x.padded_dim());
      for (int64_t& at : key_rows) at = take(x.words(n, x.dim));
      for (int64_t& at : value_rows) at = take(x.words(n, x.dim));
      for (int64_t& at : key_columns) at = take(x.words(x.dim, n));
      logits = take(n * m);
      derivatives = take(n * m);
      for (int64_t& at : weight_rows) at = take(x.words(n, m));
      for (int64_t& at : gradient_rows) at = take(x.words(n, m));
      for (int64_t& at : gradient_pairs) at = take(x.words(m, n));
      dk = take(n * x.padded_dim());
      dv = take(n * x.padded_dim());
      blocks = take((queries + Shape::kQueryBlock - 1) / Shape::kQueryBlock * block.total);
    }
    int64_t m;
    QueryLayout block;
    int64_t row, key_rows[2], value_rows[2], key_columns[3], logits, derivatives, weight_rows[2],
        gradient_rows[2], gradient_pairs[2], dk, dv, blocks;
  };

  TileBackward(const AttentionProblem& p, const AttentionTask& task, const AttentionBackward& out,
               float* scratch)
      : p_(p),
        task_(task),
        out_(out),
        x_(p.dim),
        at_(x_, task.queries),
        floats_(scratch),
        words_(reinterpret_cast<uint32_t*>(scratch)),
        keys_(p, task, p.k, tiled_, kKeyBlock),
        values_(p, task, p.v, tiled_, kKeyBlock) {}

  // False where the floats have to be multiplied as such: see Magnitude.
  bool run() {
    prefetch_next_task(p_, task_, out_, prefetcher_);
    if constexpr (Rows::kParts == 3) {
      queries_.include_rows<Rows>({query_rows(p_, task_, p_.q), nullptr, task_.queries}, p_.dim,
                                  true);
      grads_.include_rows<Rows>({query_rows(p_, task_, p_.grad), nullptr, task_.queries}, p_.dim,
                                true);
    }
    for (int64_t first = 0; first < task_.queries; first += Shape::kQueryBlock)
      prepare_queries(first);
    if (task_.queries > 0 && task_.attended_keys > 0) {
      run_pairs();
      const QueryLayout& l = at_.block;
      remainder_.run_backward(x_, out_, row_major_, [&](int64_t first) {
        return typename RemainderKeys<Rows, kDim>::QueryBlock{
            floats_of(first, l.largest), floats_of(first, l.reciprocal), floats_of(first, l.delta),
            floats_of(first, l.sums)};
      });
    }
    for (int64_t first = 0; first < task_.queries; first += Shape::kQueryBlock) {
      const WeightBlock b = block_at(x_, p_, task_, first);
      float* sums = floats_of(first, at_.block.sums);
      if constexpr (Rows::kParts == 3) sums_.see(sums, x_.padded_dim() * b.m);
      store_sums<Rows, kDim>(x_, b, sums, nullptr, row_major_, floats_ + at_.row, out_.dq);
    }
    clear_masked(p_, task_, out_.dk);
    clear_masked(p_, task_, out_.dv);
    finish_streams();
    if constexpr (Rows::kParts == 3) {
      if (queries_.small() || grads_.small() || sums_.small()) return false;
      return sums_.finite() || inputs_are_sound<Rows>(p_, task_, true);
    }
    return true;
  }

 private:
  uint32_t* words_of(int64_t query, int64_t offset) const {
    return words_ + at_.blocks + query / Shape::kQueryBlock * at_.block.total + offset;
  }
  float* floats_of(int64_t query, int64_t offset) const {
    return reinterpret_cast<float*>(words_of(query, offset));
  }

  // Attended keys of the block that begins at `key`.
  int64_t count(int64_t key) const { return std::min(tiled_ - key, kKeyBlock); }

  WeightBlock block_of(const AttentionPair& pair) const {
    WeightBlock b = block_at(x_, p_, task_, pair.query);
    b.first_key = pair.key;
    b.n = count(pair.key);
    return b;
  }

  // The pair of these keys and the first query rows from `query` on that attend to any of them.
  // The last row attends to all keys.
  AttentionPair pair_from(int64_t key, int64_t query, int64_t number) const {
    AttentionPair pair;
    if (key >= tiled_) return pair;
    pair.key = key;
    pair.starts = query == 0;
    while (block_at(x_, p_, task_, query).n <= key) query += Shape::kQueryBlock;
    pair.query = query;
    pair.ends = query + Shape::kQueryBlock >= task_.queries;
    pair.number = number;
    return pair;
  }
  AttentionPair after(const AttentionPair& pair) const {
    if (pair.key < 0) return pair;
    return pair.ends ? pair_from(pair.key + kKeyBlock, 0, pair.number + 1)
                     : pair_from(pair.key, pair.query + Shape::kQueryBlock, pair.number + 1);
  }

  void prepare_queries(int64_t first) {
    const WeightBlock b = block_at(x_, p_, task_, first);
    const QueryLayout& l = at_.block;
    place_queries<Rows, true>(x_, query_rows(p_, task_, p_.q), first, b.queries, p_.scale < 0,
                              words_of(first, l.query_columns), words_of(first, l.query_rows));
    place_queries<Rows, true>(x_, query_rows(p_, task_, p_.grad), first, b.queries, false,
                              words_of(first, l.grad_columns), words_of(first, l.grad_rows));
    compute_delta(b);
    const int64_t row = task_.head * p_.total_queries + task_.first_query + first;
    float *most = floats_of(first, l.largest), *reciprocal = floats_of(first, l.reciprocal);
    std::memset(most, 0, b.m * 4);
    std::memset(reciprocal, 0, b.m * 4);  // padding: weights 0
    std::memcpy(most, out_.statistics + row, b.queries * 4);
    std::memcpy(reciprocal, out_.statistics + p_.heads * p_.total_queries + row, b.queries * 4);
    std::memset(floats_of(first, l.sums), 0, x_.padded_dim() * b.m * 4);
  }

  // delta, the sum over the keys of each weight times the gradient w.r.t. it, is the dot product of
  // the output and the gradient w.r.t. it. By the matmul that gives the gradients w.r.t. weights,
  // so that a weight of 1 has a gradient of 0 and not of rounding. Needs room for one block of
  // keys.
  void compute_delta(const WeightBlock& b) {
    const AttendedRows rows = {query_rows(p_, task_, out_.out), nullptr, task_.queries};
    for (int64_t r = 0; r < b.m; r += kStepSide) {
      const int64_t left = b.queries - r < kStepSide ? b.queries - r : kStepSide;
      KeyPacker<Rows, kDim, true, false> pack;
      pack.start(x_, rows.slice(b.first + r, left), {{}, nullptr, 0}, words_ + at_.key_rows[0],
                 nullptr);
      while (pack.left() > 0) pack();
      float* scores = floats_ + at_.logits;
      stream_.multiply(words_ + at_.key_rows[0], kStepSide,
                       words_of(b.first, at_.block.grad_columns) + x_.words(r, p_.dim), kStepSide,
                       x_.dim_steps(), scores, kStepSide, false, interleaver_);
      stream_.finish();
      float* delta = floats_of(b.first, at_.block.delta) + r;
      for (int64_t i = 0; i < kStepSide; ++i) delta[i] = scores[i * (kStepSide + 1)];
    }
  }

  void run_pairs() {
    KeyPacker<Rows, kDim, true, true> pack_keys;
    KeyPacker<Rows, kDim, true, false> pack_values;
    Transposer transpose;
    int64_t packed = 0;
    const auto pack = [&](int64_t key) {
      const int64_t block = key / kKeyBlock;
      packed = key;
      pack_keys.start(x_, keys_.at(key), keys_.after(key), words_ + at_.key_rows[block % 2],
                      words_ + at_.key_columns[block % 3]);
      pack_values.start(x_, values_.at(key), values_.after(key), words_ + at_.value_rows[block % 2],
                        nullptr);
      interleaver_.add(pack_keys);
      interleaver_.add(pack_values);
      prefetcher_.step(kKeyBlock);
    };
    const auto add_transposition = [&] {
      if (row_major_) return;
      transpose.start(words_ + at_.key_columns[packed / kKeyBlock % 3],
                      x_.tiles(x_.words(count(packed), p_.dim)));
      interleaver_.add(transpose);
    };
    pack(0);
    add_transposition();
    interleaver_.finish();
    bool transposed = true;  // the columns of the packed block
    AttentionPair before, last, next = pair_from(0, 0, 0);
    while (next.key >= 0 || last.key >= 0) {
      if (next.key >= 0) {
        if (next.starts && next.key + kKeyBlock < tiled_)
          pack(next.key + kKeyBlock), transposed = false;
        multiply_scores(next);
      }
      before = last, last = next, next = after(next);
      if (p_.causal || before.key < 0) stream_.finish();
      DropoutRow drop[2];
      const WeightBlock b = block_of(last);
      SoftmaxStage softmax_stage(*this, last, b, p_.drop_below ? drop : nullptr);
      interleaver_.add(softmax_stage);
      if (row_major_ && last.key >= 0) {
        transpose.start(words_ + at_.gradient_pairs[last.number % 2], x_.tiles(x_.words(b.m, b.n)));
        interleaver_.add(transpose);
      }
      if (!transposed) add_transposition(), transposed = true;
      if (before.key >= 0) add_key_gradients(before);
      interleaver_.finish();
      if (before.key < 0) continue;
      StoreStage store_stage(*this, before);
      interleaver_.add(store_stage);
      add_query_gradients(before);
    }
    stream_.finish();
  }

  // Calls of interleaver_ in one matmul of so many rows, columns and depth.
  int64_t calls(int64_t m, int64_t n, int64_t depth) const {
    return x_.steps(m) * x_.steps(n) * x_.steps(depth) * Shape::kCalls;
  }
  void multiply(const uint32_t* a, int64_t m, const uint32_t* b, int64_t n, int64_t depth, float* c,
                int64_t ldc, bool accumulate) {
    stream_.multiply(a, x_.padded(m), b, x_.padded(n), x_.steps(depth), c, ldc, accumulate,
                     interleaver_);
  }

  // Logits and gradients w.r.t. the weights.
  void multiply_scores(const AttentionPair& pair) {
    const WeightBlock b = block_of(pair);
    const int64_t block = pair.key / kKeyBlock % 2;
    interleaver_.spread(2 * calls(b.n, b.m, p_.dim));
    multiply(words_ + at_.key_rows[block], b.n, words_of(pair.query, at_.block.query_columns), b.m,
             p_.dim, floats_ + at_.logits, b.m, false);
    multiply(words_ + at_.value_rows[block], b.n, words_of(pair.query, at_.block.grad_columns), b.m,
             p_.dim, floats_ + at_.derivatives, b.m, false);
    interleaver_.finish();
  }

  // The weights of two keys and 32 query rows a piece, and their gradients,
  // scale * weight (t - delta).
  class SoftmaxStage {
   public:
    SoftmaxStage(const TileBackward& pass, const AttentionPair& pair, const WeightBlock& b,
                 DropoutRow* drop)
        : b_(&b),
          at_{pair.key >= 0 ? pass.x_.padded(b.n) : 0, b.m},
          factor_(b.factor),
          scale_(b.p.scale),
          logits_(pass.floats_ + pass.at_.logits),
          derivatives_(pass.floats_ + pass.at_.derivatives),
          largest_(pass.floats_of(pair.query, pass.at_.block.largest)),
          reciprocal_(pass.floats_of(pair.query, pass.at_.block.reciprocal)),
          delta_(pass.floats_of(pair.query, pass.at_.block.delta)),
          weight_rows_(pass.words_ + pass.at_.weight_rows[pair.number % 2]),
          gradient_rows_(pass.words_ + pass.at_.gradient_rows[pair.number % 2]),
          gradient_pairs_(pass.words_ + pass.at_.gradient_pairs[pair.number % 2]),
          drop_(drop) {
      if (pair.key >= 0 && b.p.causal) mask_causal(b, pass.floats_ + pass.at_.logits);
    }
    int64_t left() const { return at_.left(); }

    void operator()() {
      if (at_.row + 1 < b_->n && drop_ == nullptr)
        compute<true>();
      else
        compute<false>();
      at_.next(gradient_pairs_, Shape::kStep);
    }

   private:
    template <bool whole>
    [[gnu::always_inline]] void compute() {
      const int64_t row = at_.row, column = at_.column, n = b_->n, m = at_.m;
      const float *s = logits_ + row * m + column, *t = derivatives_ + row * m + column;
      Vec weights[2][2], gradients[2][2], keep[2][2];
      if (!whole && drop_ != nullptr) find_kept(keep);
      FASTVLP_UNROLL
      for (int h = 0; h < 2; ++h) {
        const Vec most = load(largest_ + column + h * kLanes);
        const Vec scale = load(reciprocal_ + column + h * kLanes);
        const Vec mean = load(delta_ + column + h * kLanes);
        FASTVLP_UNROLL
        for (int i = 0; i < 2; ++i) {
          weights[i][h] = gradients[i][h] = Vec{};
          if (!whole && row + i >= n) continue;
          const int64_t at = i * m + h * kLanes;
          const Vec w = exp2(load(s + at) * factor_ - most) * scale;
          Vec g = load(t + at), entering = w;
          if (!whole && drop_ != nullptr) g = g * keep[i][h], entering = w * keep[i][h];
          weights[i][h] = entering;
          gradients[i][h] = w * (g - mean) * scale_;
        }
      }
      const int64_t along =
          (row / kStepSide * (m / kStepDepth) + column / kStepDepth) * Shape::kStep +
          row % kStepSide * kTile;
      place_weights<Rows, true, false>(weights, weight_rows_ + along, nullptr);
      place_weights<Rows, true, true>(gradients, gradient_rows_ + along, gradient_pairs_);
    }

    void find_kept(Vec keep[2][2]) {
      for (int h = 0; h < 2; ++h) {
        if (at_.row == 0) drop_[h].start(*b_, at_.column + h * kLanes);
        for (int i = 0; i < 2 && at_.row + i < b_->n; ++i)
          keep[i][h] = drop_[h].factor(*b_, at_.row + i);
      }
    }

    const WeightBlock* b_;
    WeightPieces at_;
    float factor_, scale_;
    const float *logits_, *derivatives_, *largest_, *reciprocal_, *delta_;
    uint32_t *weight_rows_, *gradient_rows_, *gradient_pairs_;
    DropoutRow* drop_;  // two, or null
  };

  void add_key_gradients(const AttentionPair& pair) {
    const WeightBlock b = block_of(pair);
    const int64_t buffer = pair.number % 2, stride = x_.padded_dim();
    interleaver_.spread(2 * calls(b.n, p_.dim, b.m));
    multiply(words_ + at_.weight_rows[buffer], b.n, words_of(pair.query, at_.block.grad_rows),
             p_.dim, b.m, floats_ + at_.dv, stride, !pair.starts);
    multiply(words_ + at_.gradient_rows[buffer], b.n, words_of(pair.query, at_.block.query_rows),
             p_.dim, b.m, floats_ + at_.dk, stride, !pair.starts);
  }

  void add_query_gradients(const AttentionPair& pair) {
    const WeightBlock b = block_of(pair);
    interleaver_.spread(calls(p_.dim, b.m, b.n));
    const uint32_t* keys = words_ + at_.key_columns[pair.key / kKeyBlock % 3];
    const uint32_t* gradients = words_ + at_.gradient_pairs[pair.number % 2];
    float* sums = floats_of(pair.query, at_.block.sums);
    if (row_major_)
      multiply(gradients, b.m, keys, p_.dim, b.n, sums, x_.padded_dim(), true);
    else
      multiply(keys, p_.dim, gradients, b.m, b.n, sums, b.m, true);
    interleaver_.finish();
  }

  // Stores gradients of a key whose sums are complete, one key a piece.
  class StoreStage {
   public:
    StoreStage(const TileBackward& pass, const AttentionPair& pair)
        : p_(&pass.p_),
          task_(&pass.task_),
          key_(pair.key),
          end_(pair.ends ? pair.key + pass.count(pair.key) : pair.key),
          stride_(pass.x_.padded_dim()),
          dk_(pass.floats_ + pass.at_.dk),
          dv_(pass.floats_ + pass.at_.dv),
          dk_out_(key_outputs(pass.p_, pass.task_, pass.out_.dk)),
          dv_out_(key_outputs(pass.p_, pass.task_, pass.out_.dv)) {}
    int64_t left() const { return end_ - key_; }

    void operator()() {
      const int64_t row = task_->key(key_);
      store_row_as<Rows, kDim>(*p_, dk_, dk_out_[row]);
      store_row_as<Rows, kDim>(*p_, dv_, dv_out_[row]);
      ++key_, dk_ += stride_, dv_ += stride_;
    }

   private:
    const AttentionProblem* p_;
    const AttentionTask* task_;
    int64_t key_, end_, stride_;
    const float *dk_, *dv_;
    OutputRows dk_out_, dv_out_;
  };

  const AttentionProblem& p_;
  const AttentionTask& task_;
  const AttentionBackward& out_;
  const Shape x_;
  const Layout at_;
  float* const floats_;
  uint32_t* const words_;
  const int64_t tiled_ = tiled_keys(p_, task_);
  const RemainderKeys<Rows, kDim> remainder_{p_, task_, tiled_};
  const KeyBlocks keys_, values_;
  const bool row_major_ = Shape::sums_row_major(task_.queries);
  const TileSession session_;
  Prefetcher prefetcher_;
  Interleaver interleaver_;
  BlockStream<Rows> stream_;
  Magnitude queries_, grads_, sums_;
};

}  // namespace

#endif
