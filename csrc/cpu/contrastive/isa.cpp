// The contrastive kernels for one instruction set. Compiled once per set with FASTVLP_ISA naming
// it; everything but the one exported table has internal linkage.
#include <cmath>

#include "../../common/contrastive_math.h"
#include "../core/isa_name.h"
#include "../gemm/pack.h"
#include "../gemm/policy.h"
#include "gradient_matmul.h"
#include "rows.h"

namespace {

using fastvlp::ContrastiveKernels;
using fastvlp::Loss;
using fastvlp::LsePair;

int64_t scratch_bytes(const ContrastiveProblem& p) { return Scratch(p).total * 4; }

template <class Gemm>
void pack_x(const ContrastiveProblem& p, int64_t block, float* base, const Scratch& s) {
  const int64_t begin = block * p.block_rows, count = p.rows_in(block);
#if defined(__AMX_BF16__)
  if constexpr (Gemm::kSplit) {
    base[s.x_factor] = factor_of_rows(p.x, begin, count, p.dim);
    return split_along_dim(Operand::kB, p.x, begin, count, p.dim, base[s.x_factor],
                           reinterpret_cast<uint32_t*>(base + s.x_panels));
  }
#endif
  pack_transposed<typename Gemm::Dot>(p.x, begin, count, p.dim, base + s.x_panels,
                                      reinterpret_cast<uint32_t*>(base + s.row));
}

// tile = scale * y x^T for one block pair, rows and columns rounded up.
template <class Gemm>
void multiply_features(const ContrastiveProblem& p, int64_t row_block, int64_t col_block,
                       float* base, const Scratch& s, float* tile) {
  using Dot = typename Gemm::Dot;
  const int64_t cols = p.cols_in(col_block), first = col_block * p.block_cols;
  const int64_t padded_rows = round_up(p.rows_in(row_block), kPanel);
#if defined(__AMX_BF16__)
  if constexpr (Gemm::kSplit)
    return split_logits(p, first, cols, padded_rows,
                        reinterpret_cast<const uint32_t*>(base + s.x_panels), base[s.x_factor],
                        split_scratch(base, s), tile);
#endif
  if constexpr (!Gemm::kSplit) {
    const uint32_t* y = unpacked_rows<Dot>(p.y, first, cols, p.dim, Gemm::kRows);
    int64_t y_stride = p.y.stride / Dot::kPerWord;
    if (y == nullptr) {
      copy_rows<Dot>(p.y, first, cols, p.dim, reinterpret_cast<uint32_t*>(base + s.y_rows),
                     row_words(p), Gemm::kRows);
      y = reinterpret_cast<const uint32_t*>(base + s.y_rows);
      y_stride = row_words(p);
    }
    Gemm::multiply(y, y_stride, base + s.x_panels, tile, fastvlp::tile_stride(p),
                   round_up(cols, Gemm::kRows), padded_rows / kPanel, depth_words<Dot>(p.dim),
                   p.scale, false);
  }
}

// The logits of one block pair; elements outside the matrix become -inf, whose exponential is 0 in
// every later pass.
template <class Gemm>
void compute_tile(const ContrastiveProblem& p, int64_t row_block, int64_t col_block, float* base,
                  const Scratch& s, float* tile) {
  const int64_t rows = p.rows_in(row_block), cols = p.cols_in(col_block);
  const int64_t padded_rows = round_up(rows, kPanel), padded_cols = round_up(cols, Gemm::kRows);
  const int64_t stride = fastvlp::tile_stride(p);
  multiply_features<Gemm>(p, row_block, col_block, base, s, tile);
  if (p.dim == 0)
    for (int64_t j = 0; j < cols; ++j) std::memset(tile + j * stride, 0, rows * 4);
  if (rows < padded_rows)
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t i = rows; i < padded_rows; ++i) tile[j * stride + i] = kNegativeInfinity;
  for (int64_t j = cols; j < padded_cols; ++j)
    for (int64_t i = 0; i < padded_rows; ++i) tile[j * stride + i] = kNegativeInfinity;
}

// How far a row's or column's log-sum-exp may lie below the shift. Bounds the rounding of z - shift
// to that of a logit of this size, and keeps every exponential that matters a normal number.
constexpr float kShiftRange = 24.0f;

float smallest(const float* values, int64_t n) {
  float low = -kNegativeInfinity;
  for (int64_t i = 0; i < n; ++i) low = values[i] < low ? values[i] : low;
  return low;
}

float largest(const float* values, int64_t n) {
  float high = kNegativeInfinity;
  for (int64_t i = 0; i < n; ++i) high = values[i] > high ? values[i] : high;
  return high;
}

template <bool rows, bool cols>
void tile_statistics(const ContrastiveProblem& p, int64_t block, int64_t tile_cols, float* tile,
                     bool keep, float* base, const Scratch& s, float* col_max, float* col_sum) {
  const int64_t stride = fastvlp::tile_stride(p), valid = p.rows_in(block);
  const int64_t n = round_up(valid, kPanel);
  float* row_max = base + s.row_max;
  float* row_sum = base + s.row_sum;
  float* new_max = base + s.tile_max;
  float* own_max = base + s.col_max;
  std::memcpy(new_max, row_max, n * 4);
  for (int64_t j = 0; j < tile_cols; ++j) own_max[j] = update_maxima(tile + j * stride, n, new_max);

  const float shift = largest(own_max, tile_cols);
  float low = rows ? smallest(new_max, valid) : shift;
  if constexpr (cols)
    for (int64_t j = 0; j < tile_cols; ++j) {
      const float known = col_max[j] > own_max[j] ? col_max[j] : own_max[j];
      low = known < low ? known : low;
    }
  const bool shifted = low >= shift - kShiftRange && shift < -kNegativeInfinity;
  shift_of(p, tile) = shifted ? shift : __builtin_nanf("");

  float* added = base + s.columns;  // this tile's row sums, relative to `shift`
  std::memset(added, 0, n * 4);
  if constexpr (rows)
    for (int64_t i = 0; i < n; i += kLanes) {
      store(row_sum + i, load(row_sum + i) * exp(load(row_max + i) - load(new_max + i)));
      store(row_max + i, load(new_max + i));
    }
  for (int64_t j = 0; j < tile_cols; ++j) {
    float* z = tile + j * stride;
    LsePair own = {own_max[j], 0.0f};
    if (!shifted)
      own.sum = add_exponentials<rows, cols>(z, n, row_max, row_sum, own_max[j]);
    else if (keep)
      own = {shift, add_shifted_exponentials<true>(z, n, shift, added)};
    else
      own = {shift, add_shifted_exponentials<false>(z, n, shift, added)};
    if constexpr (cols) {
      const LsePair merged = fastvlp::merge({col_max[j], col_sum[j]}, own);
      col_max[j] = merged.max;
      col_sum[j] = merged.sum;
    }
  }
  if (rows && shifted)
    for (int64_t i = 0; i < n; i += kLanes)
      store(row_sum + i, load(row_sum + i) + load(added + i) * exp(shift - load(row_max + i)));
}

// Moves the positives' logits of a tile to `positive` [rows] and leaves -inf in their places.
void take_positives(const ContrastiveProblem& p, int64_t row_block, int64_t col_block, float* tile,
                    float* positive) {
  const int64_t rows = p.rows_in(row_block), cols = p.cols_in(col_block);
  for (int64_t j = 0; j < cols; ++j) {
    const int64_t i = positive_row(p, row_block, col_block, j);
    if (i < 0 || i >= rows) continue;
    float& z = tile[j * fastvlp::tile_stride(p) + i];
    positive[i] = z;
    z = kNegativeInfinity;
  }
}

template <class Gemm>
void statistics_with(const ContrastiveProblem& p, int64_t block, void* scratch, float* tiles,
                     double* row_negatives, float* positive, float* col_max, float* col_sum) {
  [[maybe_unused]] const typename Gemm::State state;
  const Scratch s(p);
  float* base = static_cast<float*>(scratch);
  const int64_t rows = p.rows_in(block), padded = round_up(rows, kPanel);
  // Rows of padding: every exponential relative to the largest float is 0.
  for (int64_t i = 0; i < padded; ++i) {
    base[s.row_max + i] = i < rows ? kLowest : -kLowest;
    base[s.row_sum + i] = 0.0f;
  }
  pack_x<Gemm>(p, block, base, s);
  for (int64_t j = 0; j < p.col_blocks(); ++j) {
    float* tile = tiles ? tiles + j * fastvlp::tile_floats(p) : base + s.tile;
    compute_tile<Gemm>(p, block, j, base, s, tile);
    const int64_t first = j * p.block_cols, cols = p.cols_in(j);
    take_positives(p, block, j, tile, positive);
    const bool keep = tiles != nullptr;
    if (p.use_rows && p.use_cols)
      tile_statistics<true, true>(p, block, cols, tile, keep, base, s, col_max + first,
                                  col_sum + first);
    else if (p.use_rows)
      tile_statistics<true, false>(p, block, cols, tile, keep, base, s, nullptr, nullptr);
    else
      tile_statistics<false, true>(p, block, cols, tile, keep, base, s, col_max + first,
                                   col_sum + first);
  }
  if (p.use_rows)
    for (int64_t i = 0; i < rows; ++i)
      row_negatives[i] = fastvlp::log_sum_exp({base[s.row_max + i], base[s.row_sum + i]});
}

// The sums of a tile of the sigmoid loss. Positives are summed separately, and -inf, which adds
// nothing, in their places.
void add_sums(const ContrastiveProblem& p, int64_t row_block, int64_t col_block, float* tile,
              SigmoidSums* sums) {
  const int64_t rows = p.rows_in(row_block), cols = p.cols_in(col_block);
  for (int64_t j = 0; j < cols; ++j) {
    float* z = tile + j * fastvlp::tile_stride(p);
    const int64_t at = positive_row(p, row_block, col_block, j);
    if (at >= 0 && at < rows) {
      const float logit = z[at] + p.bias;
      positive_of(p, z) = fastvlp::sigmoid_logit_gradient(logit, true);
      z[at] = kNegativeInfinity;
      sums->loss += fastvlp::sigmoid_loss(logit, true);
      sums->gradient += positive_of(p, z);
    }
    add_sigmoid_sums(z, round_up(rows, kPanel), p.bias, sums);
  }
}

// Turns fresh softmax logits into exponentials where one shift serves the whole tile.
void shift_tile(const ContrastiveProblem& p, int64_t row_block, int64_t col_block, float* tile) {
  const int64_t rows = p.rows_in(row_block), cols = p.cols_in(col_block);
  const float* row_lse = p.row_lse + row_block * p.block_rows;
  const float* col_lse = p.col_lse + col_block * p.block_cols;
  float low = -kNegativeInfinity, shift = kNegativeInfinity;
  auto include = [&](const float* lse, int64_t n) {
    const float least = smallest(lse, n), most = largest(lse, n);
    low = least < low ? least : low;
    shift = most > shift ? most : shift;
  };
  if (p.use_rows) include(row_lse, rows);
  if (p.use_cols) include(col_lse, cols);
  const bool shifted = low >= shift - kShiftRange && shift < -kNegativeInfinity;
  shift_of(p, tile) = shifted ? shift : __builtin_nanf("");
  if (!shifted) return;
  for (int64_t j = 0; j < cols; ++j) {
    float* z = tile + j * fastvlp::tile_stride(p);
    for (int64_t i = 0; i < round_up(rows, kPanel); i += kLanes)
      store(z + i, exp(load(z + i) - shift));
  }
}

template <class Gemm>
int64_t packed_floats_with(const ContrastiveProblem& p, int64_t rows) {
#if defined(__AMX_BF16__)
  if constexpr (Gemm::kSplit) return packed_split_floats(p, rows);
#endif
  return depth_words<typename Gemm::Dot>(rows) * padded_dim(p);
}

template <class Gemm>
void pack_features(const ContrastiveProblem& p, const Features& m, int64_t begin, int64_t count,
                   void* scratch, float* packed) {
  [[maybe_unused]] float* row = static_cast<float*>(scratch) + Scratch(p).row;
#if defined(__AMX_BF16__)
  if constexpr (Gemm::kSplit) return pack_split(m, begin, count, p.dim, packed);
#endif
  pack_along_rows<typename Gemm::Dot>(m, begin, count, p.dim, packed, row);
}

template <class Gemm>
void pack_cols_with(const ContrastiveProblem& p, int64_t block, void* scratch, float* packed) {
  pack_features<Gemm>(p, p.y, block * p.block_cols, p.cols_in(block), scratch, packed);
}

template <class Gemm>
void pack_rows_with(const ContrastiveProblem& p, int64_t block, void* scratch, float* packed) {
  pack_features<Gemm>(p, p.x, block * p.block_rows, p.rows_in(block), scratch, packed);
}

template <class Gemm>
void row_gradient_with(const ContrastiveProblem& p, int64_t block, int64_t begin, int64_t end,
                       bool fresh, void* scratch, float* tiles, const float* packed,
                       float* accumulator, SigmoidSums* sums) {
  [[maybe_unused]] const typename Gemm::State state;
  const Scratch s(p);
  float* base = static_cast<float*>(scratch);
  if (fresh) pack_x<Gemm>(p, block, base, s);
  for (int64_t j = begin; j < end; ++j) {
    float* tile = tiles ? tiles + (j - begin) * fastvlp::tile_floats(p) : base + s.tile;
    if (fresh) compute_tile<Gemm>(p, block, j, base, s, tile);
    if (fresh && p.loss == Loss::kSigmoid) add_sums(p, block, j, tile, sums);
    if (!accumulator) continue;
    if (fresh && p.loss == Loss::kSoftmax) shift_tile(p, block, j, tile);
    add_row_gradient<Gemm>(p, block, j, tile, base, s,
                           packed + (j - begin) * packed_floats_with<Gemm>(p, p.block_cols),
                           accumulator);
  }
}

template <class Gemm>
void col_gradient_with(const ContrastiveProblem& p, int64_t block, int64_t begin, int64_t end,
                       void* scratch, const float* tiles, int64_t tile_step, const float* packed,
                       float* accumulator) {
  [[maybe_unused]] const typename Gemm::State state;
  const Scratch s(p);
  float* base = static_cast<float*>(scratch);
  for (int64_t i = begin; i < end; ++i)
    add_col_gradient<Gemm>(p, i, block, tiles + (i - begin) * tile_step, base, s,
                           packed + (i - begin) * packed_floats_with<Gemm>(p, p.block_rows),
                           accumulator);
}

// Each table entry chooses the GEMM by the element type.

void statistics(const ContrastiveProblem& p, int64_t block, void* scratch, float* tiles,
                double* row_negatives, float* positive, float* col_max, float* col_sum) {
  FASTVLP_WITH_GEMM(statistics_with, is_bfloat16(p))
  (p, block, scratch, tiles, row_negatives, positive, col_max, col_sum);
}

int64_t packed_floats(const ContrastiveProblem& p, int64_t rows) {
  return FASTVLP_WITH_GEMM(packed_floats_with, is_bfloat16(p))(p, rows);
}

void pack_cols(const ContrastiveProblem& p, int64_t block, void* scratch, float* packed) {
  FASTVLP_WITH_GEMM(pack_cols_with, is_bfloat16(p))(p, block, scratch, packed);
}

void pack_rows(const ContrastiveProblem& p, int64_t block, void* scratch, float* packed) {
  FASTVLP_WITH_GEMM(pack_rows_with, is_bfloat16(p))(p, block, scratch, packed);
}

void row_gradient(const ContrastiveProblem& p, int64_t block, int64_t begin, int64_t end,
                  bool fresh, void* scratch, float* tiles, const float* packed, float* accumulator,
                  SigmoidSums* sums) {
  FASTVLP_WITH_GEMM(row_gradient_with, is_bfloat16(p))
  (p, block, begin, end, fresh, scratch, tiles, packed, accumulator, sums);
}

void col_gradient(const ContrastiveProblem& p, int64_t block, int64_t begin, int64_t end,
                  void* scratch, const float* tiles, int64_t tile_step, const float* packed,
                  float* accumulator) {
  FASTVLP_WITH_GEMM(col_gradient_with, is_bfloat16(p))
  (p, block, begin, end, scratch, tiles, tile_step, packed, accumulator);
}

}  // namespace

namespace fastvlp {

const ContrastiveKernels& FASTVLP_JOIN(contrastive_kernels_, FASTVLP_ISA)() {
  static constexpr ContrastiveKernels table = {scratch_bytes, padded_dim,  packed_floats,
                                               pack_cols,     pack_rows,   statistics,
                                               row_gradient,  col_gradient};
  return table;
}

}  // namespace fastvlp
