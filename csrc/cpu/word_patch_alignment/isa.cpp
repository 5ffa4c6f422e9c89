// The word-patch alignment of one pair, for one instruction set. Compiled once per set with
// FASTVLP_ISA naming it; everything but the one exported table has internal linkage.
//
// Padding is removed first: the valid rows of both sides are gathered, and everything after works
// on a matrix without holes. Nothing at a padded position is ever read.
#include <cmath>

#include "../core/isa_name.h"
#include "../core/scratch_layout.h"
#include "../gemm/pack.h"
#include "../gemm/row_dots.h"
#include "kernel.h"
#include "transport.h"

namespace {

using fastvlp::AlignmentGradients;
using fastvlp::AlignmentPair;
using fastvlp::AlignmentProblem;
using fastvlp::AlignmentSide;

constexpr float kSmallestNorm = 1e-5f;
constexpr int64_t kGradientRows = 64;  // rows of dy whose sums stay in L2

int64_t padded_dim(const AlignmentProblem& p) { return round_up(p.dim, kPanel); }
// Room for the last tile of dot products, the last vector and the last register rows.
int64_t matrix_rows(int64_t n) { return round_up(n, 24); }
int64_t matrix_stride(int64_t n) { return round_up(n, 48) + kLanes; }

// The scratch buffers of one call, in floats; sized for the widest use.
struct Scratch : ScratchLayout {
  explicit Scratch(const AlignmentProblem& p) {
    const int64_t matrix = matrix_rows(p.x_rows) * matrix_stride(p.y_rows);
    x = take(matrix_rows(p.x_rows) * padded_dim(p));
    y = take(matrix_rows(p.y_rows) * padded_dim(p));
    cosine = take(matrix);
    a = take(matrix);
    q = take(matrix);
    delta = take(matrix_stride(p.y_rows));
    y_share = take(matrix_stride(p.y_rows));
    sigma = take(p.x_rows);
    partial = take(p.x_rows * kLanes);
    delta_log = take(matrix_stride(p.y_rows));
    sigma_log = take(p.x_rows);
    wide = take(2 * wide_doubles(p.x_rows, p.y_rows));
    row = take(padded_dim(p));
    x_index = take(p.x_rows);
    y_index = take(p.y_rows);
    const int64_t most = p.x_rows > kGradientRows ? p.x_rows : kGradientRows;
    sums = take(round_up(most, kRegisterRows) * padded_dim(p));
  }
  int64_t x, y, cosine, a, q, delta, y_share, sigma, partial, delta_log, sigma_log, wide, row,
      x_index, y_index, sums;
};

int64_t scratch_floats(const AlignmentProblem& p) { return Scratch(p).total; }

float sum_of_squares(const float* v, int64_t n) {
  Vec sum[4] = {};
  for (int64_t d = 0; d < n; d += 4 * kLanes)
    for (int k = 0; k < 4; ++k)
      if (d + k * kLanes < n) sum[k] = sum[k] + load(v + d + k * kLanes) * load(v + d + k * kLanes);
  return horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The norm of a row padded with zeros. Where the squares leave the range of a float they are
// summed again in double; the norm of an infinite row is NaN, as is its direction.
float norm(const float* v, int64_t n) {
  const float square = sum_of_squares(v, n);
  if (square > 1e-30f && square < 1e37f) return std::sqrt(square);
  double exact = 0.0;
  for (int64_t d = 0; d < n; ++d) exact += static_cast<double>(v[d]) * v[d];
  const double root = std::sqrt(exact);
  return static_cast<float>(root - root == 0.0 ? root : __builtin_nan(""));
}

void scale_row(const float* in, float factor, int64_t n, float* out) {
  for (int64_t d = 0; d < n; d += kLanes) store(out + d, load(in + d) * factor);
}

// Whether rows of floats need no padding and no conversion: they are read and written in place.
bool stays_in_place(const AlignmentProblem& p, const AlignmentSide& side) {
  return side.features.element == Element::kFloat32 && p.dim == padded_dim(p);
}

// Row `r` of the features as floats, zeros after them; in `buffer` unless it can stay in place.
const float* read_row(const AlignmentProblem& p, const AlignmentSide& side, int64_t r,
                      float* buffer) {
  if (stays_in_place(p, side))
    return static_cast<const float*>(side.features.data) + r * side.features.stride;
  convert_row(side.features, r, p.dim, buffer);
  std::memset(buffer + p.dim, 0, (padded_dim(p) - p.dim) * 4);
  return buffer;
}

// Positions of the rows that are not padding.
int64_t gather_valid(const AlignmentSide& side, int32_t* index) {
  int64_t count = 0;
  for (int64_t r = 0; r < side.features.rows; ++r) {
    side.factor[r] = side.share[r] = 0.0f;
    if (!side.padding[r]) index[count++] = static_cast<int32_t>(r);
  }
  return count;
}

// The valid rows, normalised, and zero rows up to whole tiles of dot products.
void normalise(const AlignmentProblem& p, const AlignmentSide& side, const int32_t* index,
               int64_t count, int64_t tile, float* buffer, float* out) {
  const int64_t width = padded_dim(p);
  for (int64_t r = 0; r < count; ++r) {
    const float* row = read_row(p, side, index[r], buffer);
    const float length = norm(row, width);
    const float factor = 1.0f / (length < kSmallestNorm ? kSmallestNorm : length);
    scale_row(row, factor, width, out + r * width);
    side.factor[index[r]] = factor;
    // Read again once the share is known: a row at the smallest norm is only scaled.
    side.share[index[r]] = length < kSmallestNorm ? 0.0f : 1.0f;
  }
  for (int64_t r = count; r < round_up(count, tile); ++r)
    std::memset(out + r * width, 0, width * 4);
}

// A = exp(-(1 - cosine) / beta), 0 in the lanes past the last column.
void make_kernel(const float* cosine, const Transport& t, float beta, float* a) {
  const float inverse = 1.0f / beta;
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* c = cosine + i * t.stride;
    for (int64_t j = 0; j < t.stride; j += kLanes)
      store(a + i * t.stride + j, exp((load(c + j) - 1.0f) * inverse));
    for (int64_t j = t.cols; j < t.stride; ++j) a[i * t.stride + j] = 0.0f;
  }
}

// T = diag(sigma) Q diag(delta) into the full plan, with the distance and the shares.
float finish(const AlignmentProblem& p, const AlignmentPair& pair, const Transport& t,
             const float* cosine, const int32_t* x_index, const int32_t* y_index, float* y_share) {
  double distance = 0.0;
  for (int64_t j = 0; j < t.stride; j += kLanes) store(y_share + j, Vec{});
  for (int64_t i = 0; i < t.rows; ++i) {
    float* q = t.q + i * t.stride;
    const float* c = cosine + i * t.stride;
    Vec cost = {}, share = {};
    for (int64_t j = 0; j < t.stride; j += kLanes) {
      const Vec plan = load(q + j) * load(t.delta + j) * t.sigma[i];
      const Vec similar = plan * load(c + j);
      store(q + j, plan);
      store(y_share + j, load(y_share + j) + similar);
      share = share + similar;
      cost = cost + plan * (1.0f - load(c + j));
    }
    distance += horizontal_sum(cost);
    pair.x.share[x_index[i]] *= horizontal_sum(share);
    float* out = pair.plan + x_index[i] * p.y_rows;
    for (int64_t j = 0; j < t.cols; ++j) out[y_index[j]] = q[j];
  }
  for (int64_t j = 0; j < t.cols; ++j) pair.y.share[y_index[j]] *= y_share[j];
  return static_cast<float>(distance);
}

float align(const AlignmentProblem& p, const AlignmentPair& pair, float* base) {
  const Scratch s(p);
  int32_t* x_index = reinterpret_cast<int32_t*>(base + s.x_index);
  int32_t* y_index = reinterpret_cast<int32_t*>(base + s.y_index);
  Transport t = {base + s.a,
                 base + s.q,
                 0,
                 gather_valid(pair.x, x_index),
                 gather_valid(pair.y, y_index),
                 base + s.delta,
                 base + s.sigma,
                 base + s.partial,
                 base + s.delta_log,
                 base + s.sigma_log};
  if (const int64_t n = p.x_rows * p.y_rows) std::memset(pair.plan, 0, n * 4);  // else it is null
  if (t.rows == 0 || t.cols == 0) return 0.0f;
  t.stride = round_up(t.cols, kLanes);
  // Dot products are computed in whole tiles, so their matrix is a little wider than a row of
  // vectors.
  const int64_t tiles = round_up(t.cols, kDotRowsY);
  if (tiles > t.stride) t.stride = round_up(tiles, kLanes);
  normalise(p, pair.x, x_index, t.rows, kDotRowsX, base + s.row, base + s.x);
  normalise(p, pair.y, y_index, t.cols, kDotRowsY, base + s.row, base + s.y);
  for (int64_t j = 0; j < t.cols; j += kDotRowsY)
    row_dots(base + s.x, t.rows, base + s.y + j * padded_dim(p), padded_dim(p), padded_dim(p),
             base + s.cosine + j, t.stride);
  for (int64_t i = 0; i < t.rows; ++i)
    for (int64_t j = t.cols; j < t.stride; ++j) base[s.cosine + i * t.stride + j] = 0.0f;
  make_kernel(base + s.cosine, t, p.beta, base + s.a);
  solve_transport(t, base + s.cosine, p.beta, p.iterations, p.inner,
                  reinterpret_cast<double*>(base + s.wide));
  return finish(p, pair, t, base + s.cosine, x_index, y_index, base + s.y_share);
}

// Positions of the rows that took part in the forward pass.
int64_t gather_used(const AlignmentSide& side, int32_t* index) {
  int64_t count = 0;
  for (int64_t r = 0; r < side.features.rows; ++r)
    if (side.factor[r] != 0.0f) index[count++] = static_cast<int32_t>(r);
  return count;
}

// Normalised rows as the B operand of a matmul along the rows: panels of [count][kPanel].
void pack_normalised(const AlignmentProblem& p, const AlignmentSide& side, const int32_t* index,
                     int64_t count, float* buffer, float* out) {
  for (int64_t r = 0; r < count; ++r) {
    const float* row = read_row(p, side, index[r], buffer);
    for (int64_t d = 0; d < padded_dim(p); d += kPanel)
      scale_row(row + d, side.factor[index[r]], kPanel, out + d * count + r * kPanel);
  }
}

// The derivative of the normalisation: (sums - share * normalised row) * -upstream * factor, to
// rows [first, first + count) of those that took part.
void store_gradient(const AlignmentProblem& p, const AlignmentSide& side, const int32_t* index,
                    int64_t first, int64_t count, int64_t total, const float* packed,
                    float upstream, float* sums, void* out) {
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = index[first + r];
    const float scale = -upstream * side.factor[at], share = side.share[at];
    float* sum = sums + r * padded_dim(p);
    const bool in_place = stays_in_place(p, side);
    float* to = in_place ? static_cast<float*>(out) + at * p.dim : sum;
    for (int64_t d = 0; d < padded_dim(p); d += kPanel)
      for (int64_t v = d; v < d + kPanel; v += kLanes) {
        const Vec own = load(packed + d * total + (first + r) * kPanel + (v - d));
        store(to + v, (load(sum + v) - own * share) * scale);
      }
    if (!in_place) store_row(sum, p.dim, side.features.element, out, at * p.dim);
  }
}

// Rows of padding get no gradient.
void clear_padding(const AlignmentProblem& p, const AlignmentSide& side, void* out) {
  const int64_t bytes = p.dim * bytes_of(side.features.element);
  for (int64_t r = 0; r < side.features.rows; ++r)
    if (side.factor[r] == 0.0f) std::memset(static_cast<char*>(out) + r * bytes, 0, bytes);
}

void gradients(const AlignmentProblem& p, const AlignmentPair& pair, const AlignmentGradients& out,
               float* base) {
  const Scratch s(p);
  int32_t* x_index = reinterpret_cast<int32_t*>(base + s.x_index);
  int32_t* y_index = reinterpret_cast<int32_t*>(base + s.y_index);
  const int64_t rows = gather_used(pair.x, x_index), cols = gather_used(pair.y, y_index);
  clear_padding(p, pair.x, out.dx);
  clear_padding(p, pair.y, out.dy);
  if (rows == 0) return;  // then no row of y took part either
  pack_normalised(p, pair.x, x_index, rows, base + s.row, base + s.x);
  pack_normalised(p, pair.y, y_index, cols, base + s.row, base + s.y);

  // The plan without padding, zeros up to whole register tiles in both directions.
  const int64_t stride = round_up(cols, kRegisterRows), width = padded_dim(p);
  float* plan = base + s.q;
  std::memset(plan, 0, round_up(rows, kRegisterRows) * stride * 4);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      plan[i * stride + j] = pair.plan[x_index[i] * p.y_rows + y_index[j]];
  const uint32_t* words = reinterpret_cast<const uint32_t*>(plan);
  float* sums = base + s.sums;

  multiply<FloatDot, Order::kDepthContiguous>(words, stride, base + s.y, sums, width,
                                              round_up(rows, kRegisterRows), width / kPanel, cols,
                                              1.0f, false);
  store_gradient(p, pair.x, x_index, 0, rows, rows, base + s.x, out.upstream, sums, out.dx);
  for (int64_t first = 0; first < cols; first += kGradientRows) {
    const int64_t count = cols - first < kGradientRows ? cols - first : kGradientRows;
    multiply<FloatDot, Order::kRowContiguous>(words + first, stride, base + s.x, sums, width,
                                              round_up(count, kRegisterRows), width / kPanel, rows,
                                              1.0f, false);
    store_gradient(p, pair.y, y_index, first, count, cols, base + s.y, out.upstream, sums, out.dy);
  }
}

}  // namespace

namespace fastvlp {

const WordPatchAlignmentKernels& FASTVLP_JOIN(word_patch_alignment_kernels_, FASTVLP_ISA)() {
  static constexpr WordPatchAlignmentKernels table = {scratch_floats, align, gradients};
  return table;
}

}  // namespace fastvlp
