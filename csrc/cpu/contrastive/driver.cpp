#include "driver.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "../../common/contrastive_math.h"
#include "../core/scratch.h"

namespace fastvlp {

namespace {

template <class T>
void scaled_row(const float* in, float scale, int64_t n, T* out) {
  for (int64_t d = 0; d < n; ++d) out[d] = static_cast<T>(in[d] * scale);
}

template <class T>
double dot_row(const T* a, const float* b, int64_t n) {
  // Short float runs summed in double, as accurate as the matmuls themselves. A run has lanes of
  // its own: compilers do not change the order of one sum, which would wait for every addition.
  constexpr int64_t kRun = 32, kLanes = 8;
  double total = 0.0;
  int64_t d = 0;
  for (; d + kRun <= n; d += kRun) {
    float part[kLanes] = {};
    for (int64_t e = d; e < d + kRun; e += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane)
        part[lane] += static_cast<float>(a[e + lane]) * b[e + lane];
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
      for (int64_t lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
    total += part[0];
  }
  float rest = 0.0f;
  for (; d < n; ++d) rest += static_cast<float>(a[d]) * b[d];
  return total + rest;
}

double dot_with_features(const Features& m, int64_t row, const float* b, int64_t dim) {
  return with_row(m, row, [&](const auto* a) { return dot_row(a, b, dim); });
}

// One side's gradient while chunks add to it. Sums wait as fp32 in the output itself when that is
// fp32, else in a buffer that exists only when more than one chunk adds to a block.
class Gradient {
 public:
  Gradient(GradientOutput out, int64_t rows, int64_t dim, bool several_chunks)
      : out_(out), dim_(dim) {
    if (out.element == Element::kFloat32) {
      sums_ = static_cast<float*>(out.data);
    } else if (several_chunks) {
      owned_ = allocate_floats(rows * dim);
      sums_ = owned_.get();
    }
  }

  void load(int64_t first, int64_t rows, int64_t width, bool fresh, float* accumulator) const {
    if (fresh) {
      std::memset(accumulator, 0, rows * width * 4);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(accumulator + r * width, sums_ + (first + r) * dim_, dim_ * 4);
      std::memset(accumulator + r * width + dim_, 0, (width - dim_) * 4);
    }
  }

  void store(int64_t first, int64_t rows, int64_t width, bool last, float scale,
             const float* accumulator) const {
    for (int64_t r = 0; r < rows; ++r) {
      const float* in = accumulator + r * width;
      const int64_t at = (first + r) * dim_;
      if (!last)
        std::memcpy(sums_ + at, in, dim_ * 4);
      else
        with_element_type(out_.element, [&](auto zero) {
          scaled_row(in, scale, dim_, static_cast<decltype(zero)*>(out_.data) + at);
        });
    }
  }

 private:
  GradientOutput out_;
  int64_t dim_;
  float* sums_ = nullptr;
  Buffer owned_;
};

// The blocks [row_begin, row_end) x [col_begin, col_end), processed together.
struct Chunk {
  int64_t row_begin, row_end, col_begin, col_end;
  bool fresh;  // the tiles have to be computed
  int64_t width() const { return col_end - col_begin; }
};

std::vector<Chunk> cut(const ContrastiveProblem& p, const GradientPlan& plan) {
  std::vector<Chunk> chunks;
  if (plan.kept_row_blocks > 0)
    chunks.push_back({0, plan.kept_row_blocks, 0, p.col_blocks(), false});
  for (int64_t i = plan.kept_row_blocks; i < p.row_blocks(); i += plan.chunk_rows)
    for (int64_t j = 0; j < p.col_blocks(); j += plan.chunk_cols)
      chunks.push_back({i, std::min(i + plan.chunk_rows, p.row_blocks()), j,
                        std::min(j + plan.chunk_cols, p.col_blocks()), true});
  return chunks;
}

}  // namespace

void contrastive_statistics(const ContrastiveProblem& p, const ContrastiveKernels& kernels,
                            const Parallel& parallel, int64_t threads, float* kept,
                            int64_t kept_row_blocks, double* row_negatives, double* col_negatives,
                            float* positive) {
  const int64_t blocks = p.row_blocks(), slots = std::max<int64_t>(1, std::min(threads, blocks));
  const int64_t padded_cols = p.use_cols ? p.col_blocks() * p.block_cols : 0;
  // Column partials: one set per slot, merged in slot order, so the result does not depend on
  // which thread ran when.
  Buffer col_max = allocate_floats(slots * padded_cols);
  Buffer col_sum = allocate_floats(slots * padded_cols);
  std::fill_n(col_max.get(), slots * padded_cols, -std::numeric_limits<float>::infinity());
  std::fill_n(col_sum.get(), slots * padded_cols, 0.0f);
  std::fill_n(positive, p.x.rows, 0.0f);
  advise_huge_pages(kept, kept_row_blocks * p.col_blocks() * tile_floats(p) * 4);
  parallel(slots, [&](int64_t begin, int64_t end) {
    Buffer scratch = allocate_floats(kernels.scratch_bytes(p) / 4);
    for (int64_t slot = begin; slot < end; ++slot)
      for (int64_t i = blocks * slot / slots; i < blocks * (slot + 1) / slots; ++i)
        kernels.statistics(
            p, i, scratch.get(),
            i < kept_row_blocks ? kept + i * p.col_blocks() * tile_floats(p) : nullptr,
            row_negatives + i * p.block_rows, positive + i * p.block_rows,
            col_max.get() + slot * padded_cols, col_sum.get() + slot * padded_cols);
  });
  if (!p.use_cols) return;
  for (int64_t j = 0; j < p.y.rows; ++j) {
    LsePair total = {col_max.get()[j], col_sum.get()[j]};
    for (int64_t slot = 1; slot < slots; ++slot)
      total = merge(total,
                    {col_max.get()[slot * padded_cols + j], col_sum.get()[slot * padded_cols + j]});
    col_negatives[j] = log_sum_exp(total);
  }
}

double contrastive_gradients(const ContrastiveProblem& p, const ContrastiveKernels& kernels,
                             const Parallel& parallel, const GradientPlan& plan, GradientOutput dx,
                             GradientOutput dy, SigmoidSums* sums) {
  const bool wanted = dx.data != nullptr;
  const std::vector<Chunk> chunks = cut(p, plan);
  bool split_rows = false, split_cols = false;
  int64_t scratch_tiles = 0;
  for (const Chunk& c : chunks) {
    split_rows |= c.row_begin > 0;
    split_cols |= c.col_begin > 0;
    if (c.fresh && wanted)
      scratch_tiles = std::max(scratch_tiles, (c.row_end - c.row_begin) * c.width());
  }
  Gradient x_gradient(dx, p.x.rows, p.dim, wanted && split_cols);
  Gradient y_gradient(dy, p.y.rows, p.dim, wanted && split_rows);
  Buffer tiles = allocate_floats(scratch_tiles * tile_floats(p));
  const int64_t width = kernels.padded_dim(p), step = tile_floats(p);
  // By row block, added in order afterwards: the sums do not depend on the schedule.
  std::vector<double> scale_gradient(p.row_blocks(), 0.0);
  std::vector<SigmoidSums> block_sums(p.row_blocks(), SigmoidSums{0.0, 0.0});

  // Features packed once for a chunk, not once for each tile.
  int64_t packed_size = 0;
  const int64_t packed_cols = wanted ? kernels.packed_floats(p, p.block_cols) : 0;
  const int64_t packed_rows = wanted ? kernels.packed_floats(p, p.block_rows) : 0;
  for (const Chunk& c : chunks)
    packed_size =
        std::max({packed_size, c.width() * packed_cols, (c.row_end - c.row_begin) * packed_rows});
  Buffer packed = allocate_floats(packed_size);
  auto pack = [&](auto function, int64_t first, int64_t count, int64_t step) {
    parallel(count, [&](int64_t begin, int64_t end) {
      Buffer scratch = allocate_floats(kernels.scratch_bytes(p) / 4);
      for (int64_t b = begin; b < end; ++b)
        function(p, first + b, scratch.get(), packed.get() + b * step);
    });
  };

  for (const Chunk& c : chunks) {
    float* base = c.fresh ? tiles.get() : plan.kept;
    if (wanted) pack(kernels.pack_cols, c.col_begin, c.width(), packed_cols);
    parallel(c.row_end - c.row_begin, [&](int64_t begin, int64_t end) {
      Buffer scratch = allocate_floats(kernels.scratch_bytes(p) / 4);
      Buffer accumulator = allocate_floats(wanted ? p.block_rows * width : 0);
      for (int64_t i = c.row_begin + begin; i < c.row_begin + end; ++i) {
        const int64_t first = i * p.block_rows, rows = p.rows_in(i);
        const bool last = c.col_end == p.col_blocks();
        if (wanted) x_gradient.load(first, rows, width, c.col_begin == 0, accumulator.get());
        kernels.row_gradient(p, i, c.col_begin, c.col_end, c.fresh, scratch.get(),
                             wanted ? base + (i - c.row_begin) * c.width() * step : nullptr,
                             packed.get(), wanted ? accumulator.get() : nullptr, &block_sums[i]);
        if (!wanted) continue;
        if (last)
          for (int64_t r = 0; r < rows; ++r)
            scale_gradient[i] +=
                dot_with_features(p.x, first + r, accumulator.get() + r * width, p.dim);
        x_gradient.store(first, rows, width, last, p.scale, accumulator.get());
      }
    });
    if (!wanted) continue;
    pack(kernels.pack_rows, c.row_begin, c.row_end - c.row_begin, packed_rows);
    parallel(c.width(), [&](int64_t begin, int64_t end) {
      Buffer scratch = allocate_floats(kernels.scratch_bytes(p) / 4);
      Buffer accumulator = allocate_floats(p.block_cols * width);
      for (int64_t j = c.col_begin + begin; j < c.col_begin + end; ++j) {
        const int64_t first = j * p.block_cols, rows = p.cols_in(j);
        y_gradient.load(first, rows, width, c.row_begin == 0, accumulator.get());
        kernels.col_gradient(p, j, c.row_begin, c.row_end, scratch.get(),
                             base + (j - c.col_begin) * step, c.width() * step, packed.get(),
                             accumulator.get());
        y_gradient.store(first, rows, width, c.row_end == p.row_blocks(), p.scale,
                         accumulator.get());
      }
    });
  }
  double total = 0.0;
  for (int64_t i = 0; i < p.row_blocks(); ++i) {
    total += scale_gradient[i];
    sums->loss += block_sums[i].loss;
    sums->gradient += block_sums[i].gradient;
  }
  return total;
}

}  // namespace fastvlp
