// The backward pass of one attention task of bfloat16 and at most 32 query rows on AMX tiles, keys
// and values as operands where they lie.
#pragma once

#include "unpacked.h"

#if defined(__AMX_BF16__)

namespace {

// Walks units of sixteen keys, so few that all under way stays in the first cache: logits and
// derivatives by the weights of one unit are multiplied beside the leaving of gradients of keys
// that are done, then gradients of keys of the unit before beside the making of this one's weights.
// Gradients by logits are kept, joined along the keys, for a second walk that adds up the gradients
// of queries in tiles.
template <int kDim>
class InPlaceBackward {
  static_assert(kDim == 64, "the sums of a unit are four tiles");
  using Shape = TileShape<BFloat16Rows>;
  static constexpr int64_t kUnit = kTile;
  static constexpr int kPieces = kUnit / 2;  // two keys each
  static constexpr int64_t kAhead = 6;       // units from the one that is weighed to those fetched

 public:
  static constexpr int64_t kMostQueries = kStepSide;

  struct Places : Layout {
    explicit Places(int64_t keys) {
      for (int64_t& at : columns) at = take(kStepSide * kDim / 2);
      for (int64_t& at : rows) at = take(kStepSide * kDim / 2);
      products = take(2 * kUnit * kStepSide);
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
      slope = take(kStepSide);
      gradients = take(round_up(keys, kStepSide) / kStepSide * kPartWords);
    }
    // columns and rows: of the queries and of their gradients; products: of a unit, then its
    // keys' gradients
    int64_t columns[2], rows[2], products, weight_rows, gradient_rows, pairs, dv, key_copy,
        value_copy, joined[2], sums, ordered, largest, reciprocal, slope, gradients;
  };

  InPlaceBackward(const AttentionProblem& p, const AttentionTask& task,
                  const AttentionBackward& out, float* scratch)
      : p_(p),
        task_(task),
        out_(out),
        at_(task.seen_keys),
        floats_(scratch),
        words_(reinterpret_cast<uint32_t*>(scratch)),
        keys_(p, task, p.k, tiled_),
        values_(p, task, p.v, tiled_) {}

  void run() {
    look_ahead(p_, task_, out_, ahead_);
    run_ahead_.start(p_, task_);
    const WeightBlock b = {p_, task_, 0, task_.queries, kStepSide, 0, tiled_, logit_factor(p_)};
    if (task_.queries > 0) {
      if (task_.seen_keys > 0) prepare_queries();
      if (p_.drop_below != 0)
        walk<true>(b);
      else
        walk<false>(b);
      add_query_gradients();
      odd_.run_backward(x_, out_, true, [&](int64_t) {
        return typename OddKeys<BFloat16Rows, kDim>::QueryBlock{
            floats_ + at_.largest, floats_ + at_.reciprocal, floats_ + at_.slope,
            floats_ + at_.ordered};
      });
      store_sums<BFloat16Rows, kDim>(x_, b, floats_ + at_.ordered, nullptr, true, nullptr, out_.dq);
    }
    clear_unseen(p_, task_, out_.dk);
    clear_unseen(p_, task_, out_.dv);
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
    find_slopes();
  }

  // The sum over the keys of each weight times the derivative by it is the output times the
  // derivative by the output. By the products that give those derivatives, so that a weight of 1
  // has a derivative of 0 and not of rounding.
  void find_slopes() {
    const RowBlocks<kDim> out({query_rows(p_, task_, out_.out), nullptr, task_.queries});
    float* slope = floats_ + at_.slope;
    for (int64_t half = 0; half < 2; ++half) {
      const RowBlock rows = out.block(half * kTile, kTile, words_ + at_.key_copy);
      multiply_products(rows, rows, [](int) {});
      finish();
      const float* derivatives = floats_ + at_.products + kUnit * kStepSide;
      for (int64_t i = 0; i < kTile; ++i)
        slope[half * kTile + i] = derivatives[i * kStepSide + half * kTile + i];
    }
  }

  // The weights of a unit and their gradients, scale * weight (t - slope), two keys at a time, as
  // rows along the queries and the gradients joined along the keys. Fetches rows to come.
  template <bool kDrop>
  struct Weigh {
    WeightBlock part;
    float scale;
    Vec largest[2], reciprocal[2], slope[2];
    DropoutRow* drop;
    const float* products;
    uint32_t *weights, *gradients, *pairs;
    RowBlock near_keys, near_values, next_keys, next_values;
    RunAhead<kDim>* run;
    int left = 0;

    [[gnu::always_inline]] void operator()(int count) {
      for (; count > 0 && left > 0; --count, --left) {
        Vec w[2][2], g[2][2];
        FASTVLP_UNROLL
        for (int h = 0; h < 2; ++h) {
          FASTVLP_UNROLL
          for (int i = 0; i < 2; ++i) {
            const float* at = products + i * kStepSide + h * kLanes;
            w[i][h] = exp2(load(at) * part.factor - largest[h]) * reciprocal[h];
            g[i][h] = load(at + kUnit * kStepSide);
          }
        }
        if constexpr (kDrop) {
          weigh_dropped(w, g);
        } else {
          FASTVLP_UNROLL
          for (int h = 0; h < 2; ++h) {
            FASTVLP_UNROLL
            for (int i = 0; i < 2; ++i) g[i][h] = w[i][h] * (g[i][h] - slope[h]) * scale;
          }
        }
        _mm512_store_si512(weights, bf16_row(w[0][0], w[0][1]));
        _mm512_store_si512(weights + kTile, bf16_row(w[1][0], w[1][1]));
        const __m512i low = bf16_row(g[0][0], g[0][1]), high = bf16_row(g[1][0], g[1][1]);
        _mm512_store_si512(gradients, low);
        _mm512_store_si512(gradients + kTile, high);
        store_joined(low, high, pairs);
        fetch_rows<kDim, 3>(near_keys);
        fetch_rows<kDim, 3>(near_values);
        fetch_rows<kDim, 2>(next_keys);
        fetch_rows<kDim, 2>(next_values);
        (*run)();
        products += 2 * kStepSide, weights += 2 * kTile, gradients += 2 * kTile, pairs += kTile;
        near_keys.advance(2), near_values.advance(2);
        next_keys.advance(2), next_values.advance(2);
      }
    }

   private:
    void weigh_dropped(Vec w[2][2], Vec g[2][2]) {
      const int64_t key = 2 * (kPieces - left);
      for (int h = 0; h < 2; ++h)
        for (int i = 0; i < 2; ++i) {
          const Vec keep = key + i < part.n ? drop[h].factor(part, key + i) : Vec{};
          g[i][h] = w[i][h] * (g[i][h] * keep - slope[h]) * scale;
          w[i][h] = w[i][h] * keep;
        }
    }
  };

  // Stores the gradients of a unit's keys, two a piece.
  struct Leave {
    const InPlaceBackward& pass;
    const OutputRows dk, dv;
    const bool aligned;  // to whole lines
    int64_t key = 0, left = 0;

    explicit Leave(const InPlaceBackward& p)
        : pass(p),
          dk(key_outputs(p.p_, p.task_, p.out_.dk)),
          dv(key_outputs(p.p_, p.task_, p.out_.dv)),
          aligned((reinterpret_cast<uintptr_t>(dk.data) | reinterpret_cast<uintptr_t>(dv.data) |
                   static_cast<uintptr_t>(dk.step | dv.step)) %
                      64 ==
                  0) {}

    [[gnu::always_inline]] void operator()(int count) {
      for (; count > 0 && left > 0; --count)
        for (int64_t end = left > 2 ? left - 2 : 0; left > end; --left, ++key) {
          const int64_t row = pass.task_.key(key);
          const float* from = pass.floats_ + key % kUnit * kDim;
          store(from + pass.at_.dv, static_cast<uint16_t*>(dv[row]));
          store(from + pass.at_.products, static_cast<uint16_t*>(dk[row]));
        }
    }

   private:
    [[gnu::always_inline]] void store(const float* from, uint16_t* to) const {
      FASTVLP_UNROLL
      for (int64_t d = 0; d < kDim; d += kStepSide) {
        const __m512i words = bf16_row(load(from + d), load(from + d + kLanes));
        if (aligned)
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
    Weigh<kDrop> weigh = {b,       p_.scale, {}, {}, {}, drop, nullptr,    nullptr,
                          nullptr, nullptr,  {}, {}, {}, {},   &run_ahead_};
    for (int h = 0; h < 2; ++h) {
      weigh.largest[h] = load(floats_ + at_.largest + h * kLanes);
      weigh.reciprocal[h] = load(floats_ + at_.reciprocal + h * kLanes);
      weigh.slope[h] = load(floats_ + at_.slope + h * kLanes);
    }
    const int64_t n = (tiled_ + kUnit - 1) / kUnit;
    Leave leave(*this);
    for (int64_t i = 0; i <= n && n > 0; ++i) {
      // Products of unit i, gradients of the keys of the one before; those of the one before that
      // leave.
      leave.left = i >= 2 ? kUnit : 0;
      if (i < n)
        multiply_products(keys_.block(i * kUnit, kUnit, words_ + at_.key_copy),
                          values_.block(i * kUnit, kUnit, words_ + at_.value_copy), leave);
      else
        finish();
      leave(kPieces);
      if (i > 0 && i % 2 == 0) keep_gradients(i / 2 - 1);
      if (i < n) {
        start(weigh, i, n);
        if (p_.causal || weigh.part.n < kUnit) {
          finish();
          hide_logits(weigh.part, kUnit, floats_ + at_.products);
        }
      }
      if (i > 0)
        add_key_gradients(weigh);
      else
        finish();
      weigh(kPieces);
      ahead_.step(kUnit);
    }
    finish();
    leave.left = tiled_ - leave.key;
    leave(kPieces);
    if (n % 2 != 0) {
      uint32_t* none = words_ + at_.pairs + kHalfWords / 2;
      for (int64_t half = 0; half < 2; ++half)
        std::memset(none + half * kHalfWords, 0, kHalfWords * 2);
      keep_gradients(n / 2);
    }
  }

  template <class Weigh>
  void start(Weigh& weigh, int64_t unit, int64_t units) const {
    weigh.left = kPieces;
    weigh.part.first_key = unit * kUnit;
    weigh.part.n = std::min(tiled_ - unit * kUnit, kUnit);
    weigh.products = floats_ + at_.products;
    weigh.weights = words_ + at_.weight_rows;
    weigh.gradients = words_ + at_.gradient_rows;
    weigh.pairs = words_ + at_.pairs + unit % 2 * (kHalfWords / 2);
    const int64_t ahead = (unit + kAhead) * kUnit, end = units * kUnit;
    weigh.near_keys = keys_.ahead((unit + 1) * kUnit, kUnit, end);
    weigh.near_values = values_.ahead((unit + 1) * kUnit, kUnit, end);
    weigh.next_keys = keys_.ahead(ahead, kUnit, end);
    weigh.next_values = values_.ahead(ahead, kUnit, end);
  }

  // The gradients of 32 keys' logits as the left operand of sums over keys.
  void keep_gradients(int64_t block) const {
    const uint32_t* pairs = words_ + at_.pairs;
    uint32_t* to = words_ + at_.gradients + block * kPartWords;
    for (int64_t half = 0; half < 2; ++half)
      transpose_tile(pairs + half * kHalfWords, to + half * kHalfWords);
  }

  // Logits of sixteen keys and derivatives by their weights. Begins with the leaving of what the
  // tiles hold, which `work` may then use.
  template <class Work>
  [[gnu::always_inline]] void multiply_products(const RowBlock& k, const RowBlock& v, Work&& work) {
    publish(words_);
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
    publish(words_);
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
    float *s = floats_ + at_.products, *t = s + kUnit * kStepSide;
    held_ = {{s, s + kTile, t, t + kTile}, kStepSide};
  }

  // Gradients of sixteen keys from their weights and gradients of logits. As before, `work` may use
  // what the tiles held.
  template <class Work>
  [[gnu::always_inline]] void add_key_gradients(Work&& work) {
    publish(words_);
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
    publish(words_);
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
    publish(words_);
    held_ = row_of_tiles(floats_ + at_.products);
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
        publish(words_);
        const uint32_t* gradients = words_ + at_.gradients + block * kPartWords;
        _tile_loadd(4, gradients, 64);
        load_columns(keys);
        _tile_loadd(5, gradients + kHalfWords, 64);
        if (block == 0) start_block<2, 2>(nullptr, 0, false);
        multiply_tiles<2, 2>();
      }
      if (blocks > 0) store_block<2, 2>(sums, kDim);
      publish(sums);
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

  // Stores a tile and begins it anew, beside the products of others.
  template <int tile>
  [[gnu::always_inline]] void replace() const {
    if (held_.c[0] != nullptr) store_tile<tile>(held_.c[tile], held_.row);
    zero_tile<tile>();
  }

  void finish() {
    if (held_.c[0] != nullptr) replace<0>(), replace<1>(), replace<2>(), replace<3>();
    held_.c[0] = nullptr;
    publish(words_);
  }

  const AttentionProblem& p_;
  const AttentionTask& task_;
  const AttentionBackward& out_;
  const Shape x_{kDim};
  const Places at_;
  float* const floats_;
  uint32_t* const words_;
  const int64_t tiled_ = tiled_keys(p_, task_);
  const OddKeys<BFloat16Rows, kDim> odd_{p_, task_, tiled_};
  const RowBlocks<kDim> keys_, values_;
  const TileSession session_;
  Held held_ = {};
  Ahead ahead_;
  RunAhead<kDim> run_ahead_;
};

}  // namespace

#endif
