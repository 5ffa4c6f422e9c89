// The momentum-contrastive kernels for one instruction set. Compiled once per set with FASTVLP_ISA
// naming it; everything but the one exported table has internal linkage.
#include "../../common/philox.h"
#include "../core/isa_name.h"
#include "../core/scratch_layout.h"
#include "../gemm/bf16x3_pack.h"
#include "../gemm/policy.h"
#include "rows.h"

namespace {

using fastvlp::MomentumKernels;
using fastvlp::MomentumPartial;
using fastvlp::MomentumProblem;

constexpr int64_t kGrain = 32;  // key blocks are multiples of it

int64_t padded_dim(const MomentumProblem& p) { return round_up(p.dim, kPanel); }
// Longer than needed, to spread the rows over the cache sets.
int64_t tile_stride(const MomentumProblem& p) { return p.stacked_rows() + 16; }
int64_t key_words(const MomentumProblem& p) { return round_up(p.dim, 16) + 16; }
int64_t weight_words(const MomentumProblem& p) { return p.block_keys / 2 + 16; }

inline bool is_bfloat16(const MomentumProblem& p) {
  return p.student.element == Element::kBFloat16;
}

// Whether float32 keys are split for matrix tiles. That takes the same time for any number of rows:
// for one panel of these it is more than the multiplications of floats take.
#if defined(__AMX_BF16__)
bool splits(const MomentumProblem& p, int64_t stacked) {
  return !is_bfloat16(p) && stacked > kPanel;
}
#else
bool splits(const MomentumProblem&, int64_t) { return false; }
#endif
bool splits(const MomentumProblem& p) { return splits(p, p.stacked_rows()); }

// As few as fill panels together with their teachers' rows.
int64_t group_rows(const MomentumProblem& p) {
  const int64_t kinds = p.use_teacher ? 2 : 1;
  const int64_t rows = std::min(p.group_rows, round_up(p.batch, kPanel / kinds));
  return splits(p, rows * kinds) ? p.group_rows : rows;
}

// The scratch buffers of one call, in words.
struct Scratch : ScratchLayout {
  explicit Scratch(const MomentumProblem& p) {
    factor = take(p.stacked_rows());
    row = take(2 * round_up(p.dim, kGrain));
    tile = take(p.block_keys * tile_stride(p));
#if defined(__AMX_BF16__)
    if (splits(p)) {
      const int64_t logits = split_words(p.block_keys, p.dim);
      panels = take(split_words(p.stacked_rows(), p.dim));
      keys = take(std::max(logits, split_words(p.stacked_rows(), p.block_keys)));
      packed = take(p.gradients ? split_words(p.dim, p.block_keys) : 0);
      transposed = take(kTile * kStepDepth);
      block = take(kStepSide * kStepSide);
      return;
    }
#endif
    panels = take(p.stacked_rows() * round_up(p.dim, 16));
    keys = take(p.block_keys * key_words(p));
    packed = take(p.gradients ? p.block_keys * padded_dim(p) : 0);
    pairs = take(p.gradients ? p.block_keys / 2 * tile_stride(p) : 0);
    weights = take(p.gradients ? p.stacked_rows() * weight_words(p) : 0);
  }
  int64_t panels, tile, factor, row, keys, packed;
  int64_t pairs = 0, weights = 0;     // where operands are not split
  int64_t transposed = 0, block = 0;  // where they are
};

int64_t scratch_bytes(const MomentumProblem& p) { return Scratch(p).total * 4; }

// One block of keys: its rows as an operand of the matmul with the features, unpacked if
// possible, else copied and filled up with zero rows.
struct Keys {
  Features source;  // batch or queue
  int64_t first;    // its rows
  int64_t count;
  int64_t padded;
  const uint32_t* words;
  int64_t stride;  // in words
  bool batch;
  float factor;  // what split keys have been multiplied by
};

template <class Gemm>
Keys keys_of(const MomentumProblem& p, int64_t block, uint32_t* copy) {
  using Dot = typename Gemm::Dot;
  Keys k = {};
  k.batch = block < p.batch_blocks();
  k.source = k.batch ? p.batch_keys : p.queue;
  k.first = (k.batch ? block : block - p.batch_blocks()) * p.block_keys;
  k.count = k.source.rows - k.first < p.block_keys ? k.source.rows - k.first : p.block_keys;
  k.padded = round_up(k.count, Gemm::kRows);
  if constexpr (Gemm::kSplit) return k;  // the matmuls split its source
  if (k.count == k.padded) k.words = unpacked_rows<Dot>(k.source, k.first, k.count, p.dim);
  k.stride = k.source.stride / Dot::kPerWord;
  if (k.words != nullptr) return k;
  k.words = copy;
  k.stride = key_words(p);
  copy_rows<Dot>(k.source, k.first, k.count, p.dim, copy, k.stride, Gemm::kRows);
  return k;
}

// Rows [begin, begin + count) as the columns from `at` on of the B operand of a matmul along dim:
// panels of [words of dim][kPanel rows]. `row` is scratch for one word row.
template <class Dot>
void pack_columns(const Features& m, int64_t begin, int64_t count, int64_t dim, int64_t at,
                  float* out, uint32_t* row) {
  const int64_t words = depth_words<Dot>(dim);
  for (int64_t r = 0; r < count; ++r) {
    float* column = out + (at + r) / kPanel * words * kPanel + (at + r) % kPanel;
    word_row<Dot>(m, begin + r, dim, row);
    for (int64_t k = 0; k < words; ++k) std::memcpy(column + k * kPanel, row + k, 4);
  }
}

// The rows of student and teacher as the right operand of the matmul with keys; returns what they
// were multiplied by.
template <class Gemm>
float pack_rows(const MomentumProblem& p, int64_t first_row, int64_t rows, float* base,
                const Scratch& s) {
  using Dot = typename Gemm::Dot;
#if defined(__AMX_BF16__)
  if constexpr (Gemm::kSplit) {
    const int64_t half = split_words(p.group_rows, p.dim);
    auto* panels = reinterpret_cast<uint32_t*>(base + s.panels);
    std::memset(panels, 0, (p.use_teacher ? 2 : 1) * half * 4);
    float largest = largest_magnitude(p.student, first_row, rows, p.dim);
    if (p.use_teacher)
      largest = std::max(largest, largest_magnitude(p.teacher, first_row, rows, p.dim));
    const float factor = factor_to(largest, 0);
    split_along_dim(Operand::kB, p.student, first_row, rows, p.dim, factor, panels);
    if (p.use_teacher)
      split_along_dim(Operand::kB, p.teacher, first_row, rows, p.dim, factor, panels + half);
    return factor;
  }
#endif
  uint32_t* row = reinterpret_cast<uint32_t*>(base + s.row);
  std::memset(base + s.panels, 0, p.stacked_rows() * depth_words<Dot>(p.dim) * 4);
  pack_columns<Dot>(p.student, first_row, rows, p.dim, 0, base + s.panels, row);
  if (p.use_teacher)
    pack_columns<Dot>(p.teacher, first_row, rows, p.dim, p.group_rows, base + s.panels, row);
  return 1.0f;
}

// The keys as the right operand of the matmul with weights.
template <class Gemm>
void pack_keys(const MomentumProblem& p, Keys& k, float* base, const Scratch& s) {
  using Dot = typename Gemm::Dot;
#if defined(__AMX_BF16__)
  if constexpr (Gemm::kSplit) {
    k.factor = factor_of_rows(k.source, k.first, k.count, p.dim);
    if (p.gradients)
      split_along_rows(Operand::kB, k.source, k.first, k.count, p.dim, k.factor,
                       reinterpret_cast<uint32_t*>(base + s.packed));
    return;
  }
#endif
  if (!p.gradients) return;
  constexpr Element element = Dot::kPerWord == 1 ? Element::kFloat32 : Element::kBFloat16;
  const Features view = {k.words, k.padded, k.stride * Dot::kPerWord, element};
  pack_along_rows<Dot>(view, 0, k.padded, p.dim, base + s.packed, base + s.row);
}

// tile [padded keys][stacked rows] = the keys' rows times the packed features.
template <class Gemm>
void logits(const MomentumProblem& p, const Keys& k, [[maybe_unused]] float factor, float* base,
            const Scratch& s, int64_t rows) {
#if defined(__AMX_BF16__)
  if constexpr (Gemm::kSplit) {
    auto* keys = reinterpret_cast<uint32_t*>(base + s.keys);
    split_along_dim(Operand::kA, k.source, k.first, k.count, p.dim, k.factor, keys);
    return multiply_split(keys, reinterpret_cast<const uint32_t*>(base + s.panels), steps_of(p.dim),
                          base + s.tile, tile_stride(p), k.padded, rows / kStepSide,
                          quotient(1.0, factor, k.factor), false, base + s.block);
  }
#endif
  if constexpr (!Gemm::kSplit)
    Gemm::multiply(k.words, k.stride, base + s.panels, base + s.tile, tile_stride(p), k.padded,
                   rows / kPanel, depth_words<typename Gemm::Dot>(p.dim), 1.0f, false);
}

#if defined(__AMX_BF16__)
// Weights are multiplied by this: all exponentials but those that are zero are then above what
// tiles flush.
constexpr float kWeightFactor = 4096.0f;

void add_split_keys(const MomentumProblem& p, const Keys& k, float* base, const Scratch& s,
                    int64_t rows, float* sums) {
  const int64_t steps = k.padded / kStepDepth, stride = tile_stride(p);
  auto* weights = reinterpret_cast<uint32_t*>(base + s.keys);  // the matmul with keys is done
  for (int64_t step = 0; step < steps; ++step)
    split_transposed_step(base + s.tile + step * kStepDepth * stride, stride, rows, kWeightFactor,
                          step, steps, weights, base + s.transposed);
  multiply_split(weights, reinterpret_cast<const uint32_t*>(base + s.packed), steps, sums,
                 padded_dim(p), rows, padded_dim(p) / kStepSide,
                 quotient(1.0, kWeightFactor, k.factor), true, base + s.block);
}
#endif

// sums [stacked rows][padded dim] += the weights that add_tile left times the packed keys, at least
// in the first `rows` of students and of teachers.
template <class Gemm>
void add_keys(const MomentumProblem& p, const Keys& k, float* base, const Scratch& s, int64_t rows,
              float* sums) {
  using Dot = typename Gemm::Dot;
  [[maybe_unused]] const int64_t stacked = p.stacked_rows();
#if defined(__AMX_BF16__)
  if constexpr (Gemm::kSplit) return add_split_keys(p, k, base, s, stacked, sums);
#endif
  if constexpr (!Gemm::kSplit) {
    const int64_t depth = k.padded / Dot::kPerWord, panels = padded_dim(p) / kPanel;
    const auto* found =
        reinterpret_cast<const uint32_t*>(base + (Dot::kPerWord == 1 ? s.tile : s.pairs));
#if defined(__AMX_BF16__)
    if constexpr (Gemm::kTransposed) {
      uint32_t* weights = reinterpret_cast<uint32_t*>(base + s.weights);
      transpose_words(found, tile_stride(p), depth, stacked, weights, weight_words(p));
      return Gemm::multiply(weights, weight_words(p), base + s.packed, sums, padded_dim(p), stacked,
                            panels, depth, 1.0f, true);
    }
#endif
    for (int64_t at = 0; at < stacked; at += p.group_rows)
      multiply<Dot, Order::kRowContiguous>(
          found + at, tile_stride(p), base + s.packed, sums + at * padded_dim(p), padded_dim(p),
          round_up(rows, kRegisterRows), panels, depth, 1.0f, true);
  }
}

// Adds the keys that share a row's id, other than its own, to the row's positives.
void add_positives(const MomentumProblem& p, const Keys& k, int64_t first_row, int64_t rows,
                   const float* tile, float* row, const MomentumPartial& out) {
  const int64_t* ids = p.ids + first_row;
  for (int64_t j = 0; j < k.count; ++j) {
    const int64_t id = (k.batch ? p.ids : p.queue_ids)[k.first + j];
    bool any = false;
    for (int64_t i = 0; i < rows; ++i) any |= ids[i] == id;
    if (!any) continue;
    if (p.gradients) convert_row(k.source, k.first + j, p.dim, row);
    for (int64_t i = 0; i < rows; ++i) {
      if (ids[i] != id || (k.batch && k.first + j == first_row + i)) continue;
      out.positive[i] += tile[j * tile_stride(p) + i] * p.inverse_temperature;
      out.positives[i] += 1.0f;
      if (!p.gradients) continue;
      float* sum = out.positive_keys + i * padded_dim(p);
      for (int64_t d = 0; d < p.dim; ++d) sum[d] += row[d];
    }
  }
}

// Perturbs the logits of the admissible negatives of the batch and keeps the highest: a draw from
// their softmax.
void draw_negatives(const MomentumProblem& p, const Keys& k, int64_t first_row, int64_t rows,
                    const float* tile, const MomentumPartial& out) {
  for (int64_t j = 0; j < k.count; ++j)
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = first_row + i, column = k.first + j;
      if (row == column || (p.ids != nullptr && p.ids[row] == p.ids[column])) continue;
      const uint32_t random = fastvlp::philox(p.seed, static_cast<uint32_t>(column),
                                              static_cast<uint32_t>(row), p.stream);
      const float score =
          tile[j * tile_stride(p) + i] * p.inverse_temperature + fastvlp::gumbel(random);
      if (!(score > out.best[i])) continue;
      out.best[i] = score;
      out.negative[i] = column;
    }
}

// Moves the logits of the rows' own pairs out of the tile, and excludes the keys past the end.
void set_apart(const MomentumProblem& p, const Keys& k, int64_t first_row, int64_t rows,
               int64_t group, float* tile, const MomentumPartial& out) {
  const int64_t stride = tile_stride(p), stacked = group * (p.use_teacher ? 2 : 1);
  const float excluded = excluded_dot(p.inverse_temperature);
  for (int64_t j = k.count; j < k.padded; ++j)
    for (int64_t i = 0; i < stacked; ++i) tile[j * stride + i] = excluded;
  if (!k.batch) return;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t j = first_row + i - k.first;
    if (j < 0 || j >= k.count) continue;
    for (int64_t at = i; at < stacked; at += group) {
      out.own[at] = tile[j * stride + at] * p.inverse_temperature;
      tile[j * stride + at] = excluded;
    }
  }
}

template <class Dot>
void add_tile(const MomentumProblem& p, const Keys& k, int64_t group, float* base, const Scratch& s,
              const MomentumPartial& out) {
  float scale = p.inverse_temperature;
  const int64_t stacked = group * (p.use_teacher ? 2 : 1), stride = tile_stride(p);
  float* tile = base + s.tile;
  uint32_t* pairs = reinterpret_cast<uint32_t*>(base + s.pairs);
  raise_references(tile, stride, k.padded, stacked, scale, out.reference, base + s.factor);
  rescale(base + s.factor, stacked, group, padded_dim(p), out.sum, out.cross,
          p.gradients ? out.keys : nullptr);
  if (beyond_fused_rounding(out.reference, stacked)) {
    scale_tile(tile, stride, k.padded, stacked, scale);
    scale = 1.0f;
  }
  auto add =
      p.use_teacher
          ? (p.gradients ? add_exponentials<Dot, true, true> : add_exponentials<Dot, true, false>)
          : (p.gradients ? add_exponentials<Dot, false, true>
                         : add_exponentials<Dot, false, false>);
  add(tile, stride, k.padded, group, scale, out.reference, out.sum, out.cross, pairs);
}

template <class Gemm>
void accumulate_with(const MomentumProblem& p, int64_t group_index, int64_t begin, int64_t end,
                     void* scratch, const MomentumPartial& out) {
  using Dot = typename Gemm::Dot;
  [[maybe_unused]] const typename Gemm::State state;
  const Scratch s(p);
  float* base = static_cast<float*>(scratch);
  const int64_t first_row = group_index * p.group_rows, rows = p.rows_in(group_index);
  const int64_t group = p.group_rows, stacked = p.stacked_rows();
  const float factor = pack_rows<Gemm>(p, first_row, rows, base, s);
  for (int64_t i = 0; i < stacked; ++i) out.reference[i] = lowest_reference(p.inverse_temperature);
  for (int64_t block = begin; block < end; ++block) {
    Keys k = keys_of<Gemm>(p, block, reinterpret_cast<uint32_t*>(base + s.keys));
    // Before the logits: it reads the keys in the order of memory.
    pack_keys<Gemm>(p, k, base, s);
    logits<Gemm>(p, k, factor, base, s, stacked);
    if (p.ids != nullptr) add_positives(p, k, first_row, rows, base + s.tile, base + s.row, out);
    if (p.negatives && k.batch) draw_negatives(p, k, first_row, rows, base + s.tile, out);
    set_apart(p, k, first_row, rows, group, base + s.tile, out);
    add_tile<Dot>(p, k, group, base, s, out);
    if (p.gradients) add_keys<Gemm>(p, k, base, s, rows, out.keys);
  }
}

void accumulate(const MomentumProblem& p, int64_t group, int64_t begin, int64_t end, void* scratch,
                const MomentumPartial& out) {
  if (!is_bfloat16(p) && !splits(p))
    return accumulate_with<SimdGemm<FloatDot>>(p, group, begin, end, scratch, out);
  FASTVLP_WITH_GEMM(accumulate_with, is_bfloat16(p))(p, group, begin, end, scratch, out);
}

}  // namespace

namespace fastvlp {

const MomentumKernels& FASTVLP_JOIN(momentum_kernels_, FASTVLP_ISA)() {
  static constexpr MomentumKernels table = {group_rows, scratch_bytes, padded_dim, accumulate};
  return table;
}

}  // namespace fastvlp
