// The forward pass of one attention task on AMX tiles.
#pragma once

#include "attention_tiles.h"

#if defined(__AMX_BF16__)

namespace {

// For each block of query rows the logits of all keys first, then a block of keys at a time weights
// and their sums of values. Beside the logits of one block of keys the next one is packed and the
// largest logits of the one before are found; beside the sums of one the weights of the next are made
// and its values packed.
template <class Rows, int kDim>
class TileForward {
  using Shape = TileShape<Rows>;

 public:
  struct Places : Layout {
    Places(const Shape& x, int64_t queries, int64_t keys) {
      const int64_t m = x.padded(queries < kTileQueryBlock ? queries : kTileQueryBlock);
      const int64_t n = round_up(keys, Shape::kKeyBlock);
      row = take(kLanes * x.padded_dim());
      key_rows = take(x.words(n, x.dim));
      value_columns = take(x.words(x.dim, n));
      query_columns = take(x.words(m, x.dim));
      logits = take(n * m);
      for (int64_t& at : weights) at = take(x.words(m, Shape::kKeyBlock));
      sums = take(x.padded_dim() * m);
      largest = take(m);
      reciprocal = take(m);
    }
    int64_t row, key_rows, value_columns, query_columns, logits, weights[2], sums, largest,
        reciprocal;
  };

  TileForward(const AttentionProblem& p, const AttentionTask& task, const AttentionForward& out,
              float* scratch)
      : p_(p), task_(task), out_(out), x_(p.dim), at_(x_, task.queries, task.seen_keys),
        floats_(scratch), words_(reinterpret_cast<uint32_t*>(scratch)),
        keys_(seen_rows(p, task, p.k, task.key_offset)),
        values_(seen_rows(p, task, p.v, task.value_offset)) {}

  // False where the floats have to be multiplied as such: see Magnitude.
  bool run() {
    for (int64_t first = 0; first < task_.queries; first += kTileQueryBlock)
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
      make_logits(b);
    }
    for (int64_t i = 0; i < b.m; i += kLanes) {
      const Vec logit = load(most + i) * b.factor;
      store(most + i, logit > splat(kNegativeInfinity) ? logit : Vec{});
    }
    if (b.n > 0)
      add_values(b);
    else
      std::memset(floats_ + at_.sums, 0, x_.padded_dim() * b.m * 4);
    for (int64_t i = 0; i < b.m; i += kLanes) {
      const Vec total = load(sum + i);
      store(sum + i, total > Vec{} ? 1.0f / total : total);
    }
    if constexpr (Rows::kParts == 3) sums_.see(floats_ + at_.sums, x_.padded_dim() * b.m);
    store_queries(x_, b, floats_ + at_.sums, sum, floats_ + at_.row, out_.out);
    const int64_t row = task_.head * p_.total_queries + task_.first_query + b.first;
    std::memcpy(out_.statistics + row, most, b.queries * 4);
    std::memcpy(out_.statistics + p_.heads * p_.total_queries + row, sum, b.queries * 4);
  }

  // Seen keys of the block that begins at `key`, and where its operands begin.
  int64_t count(int64_t key) const {
    return task_.seen_keys - key < Shape::kKeyBlock ? task_.seen_keys - key : Shape::kKeyBlock;
  }
  int64_t place(int64_t key) const { return x_.words(key, p_.dim); }

  // Those of them that any of the query rows may see.
  WeightBlock block_of(const WeightBlock& b, int64_t key) const {
    WeightBlock part = b;
    part.first_key = key;
    part.n = b.n - key < Shape::kKeyBlock ? b.n - key : Shape::kKeyBlock;
    return part;
  }

  // The largest logits of 32 query rows among up to 32 keys a piece.
  struct Look {
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
    const auto add_pack = [&](int64_t key) {
      if (key < keys_packed_ || key >= b.n) return;
      pack.start(x_, keys_.slice(key, count(key)), keys_ahead(p_, task_),
                 words_ + at_.key_rows + place(key), nullptr);
      beside_.add(pack);
      keys_packed_ = key + Shape::kKeyBlock;
    };
    const auto look_at = [&](int64_t key) {
      const WeightBlock part = block_of(b, key);
      float* logits = floats_ + at_.logits + key * b.m;
      if (p_.causal) mask_causal(part, logits);
      return Look{logits, floats_ + at_.largest, part.n, b.m};
    };
    add_pack(0);
    beside_.finish();
    for (int64_t key = 0; key < b.n; key += Shape::kKeyBlock) {
      add_pack(key + Shape::kKeyBlock);
      Look look = look_at(key > 0 ? key - Shape::kKeyBlock : 0);
      if (key > 0) beside_.add(look);
      multiply(words_ + at_.key_rows + place(key), x_.padded(count(key)),
               words_ + at_.query_columns, b.m, x_.dim_steps(), floats_ + at_.logits + key * b.m,
               b.m, false);
    }
    Look look = look_at((b.n - 1) / Shape::kKeyBlock * Shape::kKeyBlock);
    beside_.add(look);
    beside_.finish();
  }

  // Exponentials relative to the largest logit of two keys and 32 query rows a piece, dropped ones 0,
  // and what they add to the sums.
  struct Weigh {
    const WeightBlock* b;
    int64_t n, m;
    float factor;
    const float *logits, *largest;
    float* sums;
    uint32_t* out;
    int64_t rows;      // padded ones of n
    DropoutRow* drop;  // two, or null
    int64_t row = 0, column = 0;

    int64_t left() const { return rows / 2 * ((m - column) / kStepSide) - row / 2; }

    void operator()() {
      if (row + 1 < n && drop == nullptr)
        weigh<true>();
      else
        weigh<false>();
      out += kTile;
      if ((row += 2) % kStepDepth == 0) out += Shape::kStep - kTile * kTile;
      if (row == rows) row = 0, column += kStepSide;
    }

    template <bool whole>
    [[gnu::always_inline]] void weigh() {
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
        if (row == 0) drop[h].start(*b, column + h * kLanes);
        for (int i = 0; i < 2 && row + i < n; ++i) w[i][h] = w[i][h] * drop[h].factor(*b, row + i);
      }
    }
  };

  void add_values(const WeightBlock& b) {
    KeyPacker<Rows, kDim, false, true> pack;
    Transposer transpose;
    DropoutRow drop[2];
    const auto weigh_at = [&](const WeightBlock& part) {
      const int64_t key = part.first_key;
      return Weigh{&part, part.n, b.m, b.factor, floats_ + at_.logits + key * b.m,
                   floats_ + at_.largest, floats_ + at_.reciprocal,
                   words_ + at_.weights[key / Shape::kKeyBlock % 2],
                   key < b.n ? x_.padded(count(key)) : 0, p_.drop_below != 0 ? drop : nullptr};
    };
    const auto add_jobs = [&](int64_t key, Weigh& weigh) {
      if (key >= b.n) return;
      if (key >= values_packed_) {
        uint32_t* columns = words_ + at_.value_columns + place(key);
        pack.start(x_, values_.slice(key, count(key)), values_ahead(p_, task_), nullptr, columns);
        transpose.start(columns, x_.tiles(x_.words(count(key), p_.dim)));
        beside_.add(pack);
        beside_.add(transpose);
        values_packed_ = key + Shape::kKeyBlock;
      }
      beside_.add(weigh);
    };
    const WeightBlock first_part = block_of(b, 0);
    Weigh first = weigh_at(first_part);
    add_jobs(0, first);
    beside_.finish();
    for (int64_t key = 0; key < b.n; key += Shape::kKeyBlock) {
      const WeightBlock part = block_of(b, key + Shape::kKeyBlock);
      Weigh next = weigh_at(part);
      add_jobs(key + Shape::kKeyBlock, next);
      multiply(words_ + at_.value_columns + place(key), x_.padded_dim(),
               words_ + at_.weights[key / Shape::kKeyBlock % 2], b.m, x_.steps(count(key)),
               floats_ + at_.sums, b.m, key > 0);
    }
  }

  void multiply(const uint32_t* a, int64_t m, const uint32_t* b, int64_t n, int64_t steps, float* c,
                int64_t ldc, bool accumulate) {
    beside_.spread(m / kStepSide * (n / kStepSide) * steps * Shape::kCalls);
    multiply_blocks<Rows>(a, m, b, n, steps, c, ldc, accumulate, beside_);
    beside_.finish();
  }

  const AttentionProblem& p_;
  const AttentionTask& task_;
  const AttentionForward& out_;
  const Shape x_;
  const Places at_;
  float* const floats_;
  uint32_t* const words_;
  const SeenRows keys_, values_;
  const TileSession session_;
  int64_t keys_packed_ = 0, values_packed_ = 0;  // whole blocks
  Beside beside_;
  Magnitude sums_;
};

}  // namespace

#endif
