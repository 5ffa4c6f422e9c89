// The contrastive kernels for one instruction set. Compiled once per set with FASTVLP_ISA naming
// it; everything but the one exported table has internal linkage.
#include <cmath>

#include "../common/contrastive_math.h"
#include "contrastive_rows.h"
#include "pack.h"

#ifndef FASTVLP_ISA
#error "define FASTVLP_ISA"
#endif
#define FASTVLP_JOIN_(a, b) a##b
#define FASTVLP_JOIN(a, b) FASTVLP_JOIN_(a, b)
#define FASTVLP_STRING_(a) #a
#define FASTVLP_STRING(a) FASTVLP_STRING_(a)

namespace {

using fastvlp::ContrastiveKernels;
using fastvlp::Loss;
using fastvlp::LsePair;

#if defined(__AVX512BF16__)
bool uses_bf16_products(const ContrastiveProblem& p) {
  return p.x.element == Element::kBFloat16 && p.y.element == Element::kBFloat16;
}
#endif

int64_t padded_dim(const ContrastiveProblem& p) { return round_up(p.dim, kPanel); }

// Rows of the packed A operand are 16 words longer than needed, to spread over the cache sets.
int64_t row_words(const ContrastiveProblem& p) { return round_up(p.dim, 16) + 16; }

// The scratch buffers of one call, in words; sized for the widest use.
struct Scratch {
  explicit Scratch(const ContrastiveProblem& p) {
    const int64_t longest = p.block_rows > p.block_cols ? p.block_rows : p.block_cols;
    x_panels = take(p.block_rows * round_up(p.dim, 16));
    y_rows = take(p.block_cols * row_words(p));
    gradient = take(p.block_cols * fastvlp::tile_stride(p));
    features = take(longest * padded_dim(p));
    row = take(2 * padded_dim(p));
    columns = take(2 * p.block_rows);
    row_max = take(p.block_rows);
    row_sum = take(p.block_rows);
    tile_max = take(p.block_rows);
    col_max = take(p.block_cols);
    tile = take(fastvlp::tile_floats(p));
  }
  int64_t take(int64_t words) {
    const int64_t at = total;
    total += round_up(words, 16);
    return at;
  }
  int64_t total = 0;
  int64_t x_panels, y_rows, gradient, features, row, columns, row_max, row_sum, tile_max, col_max,
      tile;
};

int64_t scratch_bytes(const ContrastiveProblem& p) { return Scratch(p).total * 4; }

template <class Dot>
void pack_x(const ContrastiveProblem& p, int64_t block, float* base, const Scratch& s) {
  pack_transposed<Dot>(p.x, block * p.block_rows, p.rows_in(block), p.dim, base + s.x_panels,
                       reinterpret_cast<uint32_t*>(base + s.row));
}

// tile = scale * y x^T for one block pair; elements outside the matrix become -inf, whose
// exponential is 0 in every later pass.
template <class Dot>
void compute_tile(const ContrastiveProblem& p, int64_t row_block, int64_t col_block, float* base,
                  const Scratch& s, float* tile) {
  const int64_t rows = p.rows_in(row_block), cols = p.cols_in(col_block);
  const int64_t stride = fastvlp::tile_stride(p), words = depth_words<Dot>(p.dim);
  uint32_t* y = reinterpret_cast<uint32_t*>(base + s.y_rows);
  pack_rows<Dot>(p.y, col_block * p.block_cols, cols, p.dim, y, row_words(p));
  multiply<Dot, Order::kDepthContiguous>(y, row_words(p), base + s.x_panels, tile, stride,
                                         round_up(cols, kRegisterRows),
                                         round_up(rows, kPanel) / kPanel, words, p.scale, false);
  if (words == 0)
    for (int64_t j = 0; j < cols; ++j) std::memset(tile + j * stride, 0, rows * 4);
  if (rows < round_up(rows, kPanel))
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t i = rows; i < round_up(rows, kPanel); ++i)
        tile[j * stride + i] = kNegativeInfinity;
  for (int64_t j = cols; j < round_up(cols, kRegisterRows); ++j)
    for (int64_t i = 0; i < round_up(rows, kPanel); ++i) tile[j * stride + i] = kNegativeInfinity;
}

template <bool rows, bool cols>
void tile_statistics(const ContrastiveProblem& p, int64_t n, int64_t tile_cols, const float* tile,
                     float* base, const Scratch& s, float* col_max, float* col_sum) {
  const int64_t stride = fastvlp::tile_stride(p);
  float* row_max = base + s.row_max;
  float* row_sum = base + s.row_sum;
  float* tile_max = base + s.tile_max;
  float* own_max = base + s.col_max;
  std::memcpy(tile_max, row_max, n * 4);
  for (int64_t j = 0; j < tile_cols; ++j)
    own_max[j] = update_maxima(tile + j * stride, n, tile_max);
  if constexpr (rows)
    for (int64_t i = 0; i < n; i += kLanes) {
      store(row_sum + i, load(row_sum + i) * exp(load(row_max + i) - load(tile_max + i)));
      store(row_max + i, load(tile_max + i));
    }
  for (int64_t j = 0; j < tile_cols; ++j) {
    const float sum =
        add_exponentials<rows, cols>(tile + j * stride, n, row_max, row_sum, own_max[j]);
    if constexpr (cols) {
      const LsePair merged = fastvlp::merge({col_max[j], col_sum[j]}, {own_max[j], sum});
      col_max[j] = merged.max;
      col_sum[j] = merged.sum;
    }
  }
}

template <class Dot>
void statistics_with(const ContrastiveProblem& p, int64_t block, void* scratch, float* tiles,
                     float* row_lse, float* positive, float* col_max, float* col_sum) {
  const Scratch s(p);
  float* base = static_cast<float*>(scratch);
  const int64_t rows = p.rows_in(block), padded = round_up(rows, kPanel);
  for (int64_t i = 0; i < padded; ++i) {
    base[s.row_max + i] = kNegativeInfinity;
    base[s.row_sum + i] = 0.0f;
  }
  pack_x<Dot>(p, block, base, s);
  for (int64_t j = 0; j < p.col_blocks(); ++j) {
    float* tile = tiles ? tiles + j * fastvlp::tile_floats(p) : base + s.tile;
    compute_tile<Dot>(p, block, j, base, s, tile);
    const int64_t first = j * p.block_cols, cols = p.cols_in(j);
    if (p.use_rows && p.use_cols)
      tile_statistics<true, true>(p, padded, cols, tile, base, s, col_max + first, col_sum + first);
    else if (p.use_rows)
      tile_statistics<true, false>(p, padded, cols, tile, base, s, nullptr, nullptr);
    else
      tile_statistics<false, true>(p, padded, cols, tile, base, s, col_max + first,
                                   col_sum + first);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = block * p.block_rows + i + p.offset - first;
      if (at >= 0 && at < cols) positive[i] = tile[at * fastvlp::tile_stride(p) + i];
    }
  }
  if (p.use_rows)
    for (int64_t i = 0; i < rows; ++i)
      row_lse[i] = fastvlp::log_sum_exp({base[s.row_max + i], base[s.row_sum + i]});
}

void add_sums(const ContrastiveProblem& p, int64_t row_block, int64_t col_block, const float* tile,
              SigmoidSums* sums) {
  const int64_t rows = p.rows_in(row_block), cols = p.cols_in(col_block);
  for (int64_t j = 0; j < cols; ++j) {
    const float* z = tile + j * fastvlp::tile_stride(p);
    add_sigmoid_sums(z, round_up(rows, kPanel), p.bias, sums);
    const int64_t at = col_block * p.block_cols + j - p.offset - row_block * p.block_rows;
    if (at >= 0 && at < rows) {
      sums->loss -= z[at] + p.bias;
      sums->gradient -= 1.0;
    }
  }
}

// Logit gradients of a tile as the A operand of the product with y: words along the columns.
template <class Dot>
void gradient_for_rows(const ContrastiveProblem& p, int64_t row_block, int64_t col_block,
                       const float* tile, float* base, const Scratch& s) {
  const int64_t n = round_up(p.rows_in(row_block), kPanel), stride = fastvlp::tile_stride(p);
  const int64_t cols = p.cols_in(col_block);
  float* g = base + s.gradient;
  if constexpr (Dot::kPerWord == 1) {
    for (int64_t j = 0; j < cols; ++j)
      logit_gradient(p, row_block, col_block, j, tile + j * stride, n, g + j * stride);
  } else {
#if defined(__AVX512BF16__)
    float* pair = base + s.columns;
    for (int64_t j = 0; j < cols; j += 2) {
      logit_gradient(p, row_block, col_block, j, tile + j * stride, n, pair);
      if (j + 1 < cols)
        logit_gradient(p, row_block, col_block, j + 1, tile + (j + 1) * stride, n, pair + n);
      else
        std::memset(pair + n, 0, n * 4);
      uint32_t* out = reinterpret_cast<uint32_t*>(g + j / 2 * stride);
      for (int64_t i = 0; i < n; i += kLanes)
        store_bf16_pairs(out + i, load(pair + i), load(pair + n + i));
    }
#endif
  }
}

// The same as the A operand of the product with x: words along the rows.
template <class Dot>
void gradient_for_cols(const ContrastiveProblem& p, int64_t row_block, int64_t col_block,
                       const float* tile, float* base, const Scratch& s) {
  if constexpr (Dot::kPerWord == 1) {
    gradient_for_rows<Dot>(p, row_block, col_block, tile, base, s);
  } else {
#if defined(__AVX512BF16__)
    const int64_t n = round_up(p.rows_in(row_block), kPanel), stride = fastvlp::tile_stride(p);
    uint32_t* out = reinterpret_cast<uint32_t*>(base + s.gradient);
    float* column = base + s.columns;
    for (int64_t j = 0; j < p.cols_in(col_block); ++j) {
      logit_gradient(p, row_block, col_block, j, tile + j * stride, n, column);
      for (int64_t i = 0; i < n; i += 2 * kLanes)
        store_bf16(out + j * stride + i / 2, load(column + i), load(column + i + kLanes));
    }
#endif
  }
}

template <class Dot>
void row_gradient_with(const ContrastiveProblem& p, int64_t block, int64_t begin, int64_t end,
                       bool fresh, void* scratch, float* tiles, float* accumulator,
                       SigmoidSums* sums) {
  const Scratch s(p);
  float* base = static_cast<float*>(scratch);
  const int64_t m = round_up(p.rows_in(block), kRegisterRows), width = padded_dim(p);
  if (fresh) pack_x<Dot>(p, block, base, s);
  for (int64_t j = begin; j < end; ++j) {
    float* tile = tiles ? tiles + (j - begin) * fastvlp::tile_floats(p) : base + s.tile;
    if (fresh) compute_tile<Dot>(p, block, j, base, s, tile);
    if (fresh && p.loss == Loss::kSigmoid) add_sums(p, block, j, tile, sums);
    if (!accumulator) continue;
    gradient_for_rows<Dot>(p, block, j, tile, base, s);
    pack_along_rows<Dot>(p.y, j * p.block_cols, p.cols_in(j), p.dim, base + s.features,
                         base + s.row);
    multiply<Dot, Order::kRowContiguous>(reinterpret_cast<uint32_t*>(base + s.gradient),
                                         fastvlp::tile_stride(p), base + s.features, accumulator,
                                         width, m, width / kPanel, depth_words<Dot>(p.cols_in(j)),
                                         1.0f, true);
  }
}

template <class Dot>
void col_gradient_with(const ContrastiveProblem& p, int64_t block, int64_t begin, int64_t end,
                       void* scratch, const float* tiles, int64_t tile_step, float* accumulator) {
  const Scratch s(p);
  float* base = static_cast<float*>(scratch);
  const int64_t m = round_up(p.cols_in(block), kRegisterRows), width = padded_dim(p);
  for (int64_t i = begin; i < end; ++i) {
    gradient_for_cols<Dot>(p, i, block, tiles + (i - begin) * tile_step, base, s);
    pack_along_rows<Dot>(p.x, i * p.block_rows, p.rows_in(i), p.dim, base + s.features,
                         base + s.row);
    multiply<Dot, Order::kDepthContiguous>(reinterpret_cast<uint32_t*>(base + s.gradient),
                                           fastvlp::tile_stride(p), base + s.features, accumulator,
                                           width, m, width / kPanel,
                                           depth_words<Dot>(p.rows_in(i)), 1.0f, true);
  }
}

// Each table entry chooses the product by the element type; only this set's own products exist.
#if defined(__AVX512BF16__)
#define FASTVLP_WITH_DOT(function) \
  (uses_bf16_products(p) ? function<BFloat16Dot> : function<FloatDot>)
#else
#define FASTVLP_WITH_DOT(function) (function<FloatDot>)
#endif

void statistics(const ContrastiveProblem& p, int64_t block, void* scratch, float* tiles,
                float* row_lse, float* positive, float* col_max, float* col_sum) {
  FASTVLP_WITH_DOT(statistics_with)
  (p, block, scratch, tiles, row_lse, positive, col_max, col_sum);
}

void row_gradient(const ContrastiveProblem& p, int64_t block, int64_t begin, int64_t end,
                  bool fresh, void* scratch, float* tiles, float* accumulator, SigmoidSums* sums) {
  FASTVLP_WITH_DOT(row_gradient_with)
  (p, block, begin, end, fresh, scratch, tiles, accumulator, sums);
}

void col_gradient(const ContrastiveProblem& p, int64_t block, int64_t begin, int64_t end,
                  void* scratch, const float* tiles, int64_t tile_step, float* accumulator) {
  FASTVLP_WITH_DOT(col_gradient_with)
  (p, block, begin, end, scratch, tiles, tile_step, accumulator);
}

}  // namespace

namespace fastvlp {

const ContrastiveKernels& FASTVLP_JOIN(contrastive_kernels_, FASTVLP_ISA)() {
  static constexpr ContrastiveKernels table = {FASTVLP_STRING(FASTVLP_ISA), scratch_bytes,
                                               padded_dim, statistics, row_gradient, col_gradient};
  return table;
}

}  // namespace fastvlp
