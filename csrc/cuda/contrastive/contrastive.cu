// The elementwise passes of the contrastive losses: softmax statistics, logit gradients, and the
// sigmoid loss, each one read of a chunk of similarities. The arithmetic of an element is in
// common/contrastive_math.h.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../core/launch.h"
#include "../core/vector_store.h"
#include "contrastive.h"

namespace fastvlp::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kLanes * kWarps;
constexpr int kVector = 4;  // floats of one 16-byte load

// A tile of the statistics: a warp covers its whole width, so that a row costs one exchange between
// lanes, and the eight warps take its rows in turn, a strip of four at a time.
constexpr int kGroups = 2;  // vectors of a lane along a row
constexpr int kTileCols = kLanes * kVector * kGroups;
constexpr int kStrip = 4;
constexpr int kTileRows = kWarps * kStrip * 4;
static_assert(kTileCols == kThreads, "one thread merges one column of a tile");

// A tile of the gradients: each thread takes kVector columns of every fourth row.
constexpr int kGradientCols = 64 * kVector;
constexpr int kGradientRows = 32;
constexpr int kRowStep = kThreads / 64;

__host__ __device__ constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// scale * similarity + bias of kVector neighbours, -inf outside the matrix: its exponential is 0,
// and so are its sigmoid and its softplus.
__device__ __forceinline__ void load_logits(const Similarities& p, int64_t row, int64_t col,
                                            float scale, float bias, float* z) {
  const float* at = p.data + row * p.stride + col;
  if (p.vectorized && row < p.rows && col + kVector <= p.cols) {
    const float4 v = *reinterpret_cast<const float4*>(at);
    z[0] = fmaf(scale, v.x, bias);
    z[1] = fmaf(scale, v.y, bias);
    z[2] = fmaf(scale, v.z, bias);
    z[3] = fmaf(scale, v.w, bias);
  } else {
#pragma unroll
    for (int k = 0; k < kVector; ++k)
      z[k] = row < p.rows && col + k < p.cols ? fmaf(scale, at[k], bias) : -INFINITY;
  }
}

// Leaves a positive among kVector neighbours out of every sum of exponentials.
__device__ __forceinline__ void exclude_positive(const Similarities& p, int64_t row, int64_t col,
                                                 float* z) {
  const int64_t at = row + p.offset - col;
#pragma unroll
  for (int k = 0; k < kVector; ++k)
    if (at == k) z[k] = -INFINITY;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2)
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, mask));
  return v;
}

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
  return v;
}

// The pair of a strip's row over the tile's columns; the same on every lane.
__device__ __forceinline__ LsePair row_pair(const float* z) {
  constexpr int n = kGroups * kVector;
  float max = z[0], sum = 0.0f;
#pragma unroll
  for (int c = 1; c < n; ++c) max = fmaxf(max, z[c]);
  max = warp_max(max);
  const float reference = exponent_reference(max);
#pragma unroll
  for (int c = 0; c < n; ++c) sum += expf(z[c] - reference);
  return {max, warp_sum(sum)};
}

// Adds a strip's column to the running pair of that column. fmaxf ignores a NaN, which reaches the
// sum all the same.
__device__ __forceinline__ LsePair add_column(LsePair running,
                                              const float (&z)[kStrip][kGroups * kVector], int c) {
  float max = running.max;
#pragma unroll
  for (int r = 0; r < kStrip; ++r) max = fmaxf(max, z[r][c]);
  const float reference = exponent_reference(max);
  float sum = running.sum * expf(running.max - reference);
#pragma unroll
  for (int r = 0; r < kStrip; ++r) sum += expf(z[r][c] - reference);
  return {max, sum};
}

// One tile: pairs of its rows' negatives to row_pairs [rows, column tiles], of its columns' to
// col_pairs [row tiles, cols].
template <bool kRows, bool kCols>
__global__ void __launch_bounds__(kThreads)
    tile_statistics(Similarities p, const float* scale_at, LsePair* row_pairs, LsePair* col_pairs) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t col_tiles = div_up(p.cols, kTileCols);
  const int64_t row_tile = blockIdx.x / col_tiles, col_tile = blockIdx.x % col_tiles;
  const float scale = *scale_at;
  LsePair running[kGroups * kVector];
#pragma unroll
  for (int c = 0; c < kGroups * kVector; ++c) running[c] = {-INFINITY, 0.0f};

  for (int step = 0; step < kTileRows; step += kWarps * kStrip) {
    const int64_t first = row_tile * kTileRows + step + warp * kStrip;
    if (first >= p.rows) break;
    float z[kStrip][kGroups * kVector];
#pragma unroll
    for (int r = 0; r < kStrip; ++r)
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int64_t col = col_tile * kTileCols + (g * kLanes + lane) * kVector;
        load_logits(p, first + r, col, scale, 0.0f, &z[r][g * kVector]);
        exclude_positive(p, first + r, col, &z[r][g * kVector]);
      }
    if constexpr (kRows) {
#pragma unroll
      for (int r = 0; r < kStrip; ++r) {
        const LsePair pair = row_pair(z[r]);
        if (lane == 0 && first + r < p.rows) row_pairs[(first + r) * col_tiles + col_tile] = pair;
      }
    }
    if constexpr (kCols) {
#pragma unroll
      for (int c = 0; c < kGroups * kVector; ++c) running[c] = add_column(running[c], z, c);
    }
  }

  if constexpr (kCols) {
    __shared__ LsePair by_warp[kWarps][kTileCols];
#pragma unroll
    for (int c = 0; c < kGroups * kVector; ++c)
      by_warp[warp][(c / kVector * kLanes + lane) * kVector + c % kVector] = running[c];
    __syncthreads();
    LsePair total = by_warp[0][threadIdx.x];
    for (int w = 1; w < kWarps; ++w) total = merge(total, by_warp[w][threadIdx.x]);
    const int64_t col = col_tile * kTileCols + threadIdx.x;
    if (col < p.cols) col_pairs[row_tile * p.cols + col] = total;
  }
}

// A warp for each row: merges its pairs, and fetches its positive.
__global__ void __launch_bounds__(kThreads)
    finish_rows(Similarities p, const float* scale_at, const LsePair* row_pairs,
                double* row_negatives, float* positive) {
  const int lane = threadIdx.x % kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (row >= p.rows) return;
  if (lane == 0) {
    const int64_t col = row + p.offset;
    positive[row] = col >= 0 && col < p.cols ? *scale_at * p.data[row * p.stride + col] : 0.0f;
  }
  if (row_negatives == nullptr) return;
  const int64_t tiles = div_up(p.cols, kTileCols);
  LsePair total = {-INFINITY, 0.0f};
  for (int64_t t = lane; t < tiles; t += kLanes) total = merge(total, row_pairs[row * tiles + t]);
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2)
    total = merge(total, {__shfl_down_sync(0xffffffffu, total.max, mask),
                          __shfl_down_sync(0xffffffffu, total.sum, mask)});
  if (lane == 0) row_negatives[row] = log_sum_exp(total);
}

// A thread for each column: merges its pairs into the running one, in the order of the rows.
__global__ void __launch_bounds__(kThreads)
    finish_cols(int64_t cols, int64_t tiles, const LsePair* col_pairs, float* col_max,
                float* col_sum) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (col >= cols) return;
  LsePair total = {col_max[col], col_sum[col]};
  for (int64_t t = 0; t < tiles; ++t) total = merge(total, col_pairs[t * cols + col]);
  col_max[col] = total.max;
  col_sum[col] = total.sum;
}

__device__ __forceinline__ void convert(float v, float* out) { *out = v; }
__device__ __forceinline__ void convert(float v, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(v);
}
__device__ __forceinline__ void convert(float v, __half* out) { *out = __float2half_rn(v); }

template <class T>
__device__ __forceinline__ void store_gradients(const Similarities& p, const Output& out,
                                                int64_t row, int64_t col, const float* g) {
  T values[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) convert(g[k], &values[k]);
  T* at = static_cast<T*>(out.data) + row * out.stride + col;
  if (out.vectorized && col + kVector <= p.cols) {
    store_four(at, values);
  } else {
#pragma unroll
    for (int k = 0; k < kVector; ++k)
      if (col + k < p.cols) at[k] = values[k];
  }
}

// This thread's first row and column in the tile of its block.
struct Place {
  __device__ explicit Place(const Similarities& p) {
    const int64_t col_tiles = div_up(p.cols, kGradientCols);
    row = blockIdx.x / col_tiles * kGradientRows + threadIdx.x / 64;
    col = blockIdx.x % col_tiles * kGradientCols + threadIdx.x % 64 * kVector;
    end = blockIdx.x / col_tiles * kGradientRows + kGradientRows;
    if (end > p.rows) end = p.rows;
  }
  int64_t row, col, end;
};

// The softmax of one row or column: its log-sum-exp rounded to float, and its weight times
// exp(-what the rounding left out), which would scale the whole softmax: at a log-sum-exp of 100 by
// 4e-6.
struct Direction {
  float lse = 0.0f;
  float weight = 0.0f;
};

__device__ __forceinline__ Direction direction(const double* lse, int64_t at, float weight) {
  if (lse == nullptr) return {};
  const float near = static_cast<float>(lse[at]);
  const float rest = static_cast<float>(lse[at] - near);
  return {near, rest == rest ? weight * expf(-rest) : weight};  // infinity minus itself is NaN
}

// `out` may be the similarities: an element is read by the thread that writes it, before it does.
template <class T>
__global__ void __launch_bounds__(kThreads)
    write_softmax_gradient(Similarities p, const float* scale_at, const double* row_lse,
                           const double* col_lse, const float* positive_gradient,
                           const float* weights, Output out) {
  const Place place(p);
  if (place.col >= p.cols) return;
  const float scale = *scale_at;
  Direction cols[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k)
    if (place.col + k < p.cols) cols[k] = direction(col_lse, place.col + k, weights[1]);
  for (int64_t row = place.row; row < place.end; row += kRowStep) {
    const Direction own = direction(row_lse, row, weights[0]);
    const float positive = positive_gradient[row];
    float g[kVector];
    load_logits(p, row, place.col, scale, 0.0f, g);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      g[k] = softmax_logit_gradient(g[k], own.lse, cols[k].lse, own.weight, cols[k].weight);
      if (row + p.offset == place.col + k) g[k] = positive;
    }
    store_gradients<T>(p, out, row, place.col, g);
  }
}

// The two sums of a block, in a fixed order; valid in thread 0.
__device__ void block_sums(double* loss, double* gradient) {
  __shared__ double by_warp[2][kWarps];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  *loss = warp_sum(*loss);
  *gradient = warp_sum(*gradient);
  if (lane == 0) {
    by_warp[0][warp] = *loss;
    by_warp[1][warp] = *gradient;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) {
    *loss += by_warp[0][w];
    *gradient += by_warp[1][w];
  }
}

// One tile: its two sums to partials [2, blocks], factor * gradient to `out` where it is wanted.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sigmoid_tile(Similarities p, const float* scale_at, const float* bias_at, float factor,
                 double* partials, Output out) {
  const Place place(p);
  const float scale = *scale_at, bias = *bias_at;
  // Short float runs, then double: vectorised arithmetic, yet no error that grows with the tile.
  double loss = 0.0, gradient = 0.0;
  for (int64_t row = place.row; row < place.end && place.col < p.cols; row += kRowStep) {
    float z[kVector], losses[kVector], g[kVector];
    load_logits(p, row, place.col, scale, bias, z);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      // Lanes past the end hold -inf, the logit of a negative without loss: never a positive.
      const bool positive = row + p.offset == place.col + k && place.col + k < p.cols;
      losses[k] = sigmoid_loss(z[k], positive);
      g[k] = sigmoid_logit_gradient(z[k], positive);
    }
    loss += (losses[0] + losses[1]) + (losses[2] + losses[3]);
    gradient += (g[0] + g[1]) + (g[2] + g[3]);
    if (out.data == nullptr) continue;
#pragma unroll
    for (int k = 0; k < kVector; ++k) g[k] *= factor;
    store_gradients<T>(p, out, row, place.col, g);
  }
  block_sums(&loss, &gradient);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = loss;
    partials[gridDim.x + blockIdx.x] = gradient;
  }
}

// One block: adds the partial sums to the running ones.
__global__ void __launch_bounds__(kThreads)
    add_partials(int64_t blocks, const double* partials, double* sums) {
  double loss = 0.0, gradient = 0.0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    loss += partials[i];
    gradient += partials[blocks + i];
  }
  block_sums(&loss, &gradient);
  if (threadIdx.x == 0) {
    sums[0] += loss;
    sums[1] += gradient;
  }
}

int64_t gradient_tiles(const Similarities& p) {
  return div_up(p.rows, kGradientRows) * div_up(p.cols, kGradientCols);
}

// Calls `use` with a value of the output's element type.
template <class Use>
void with_element(Element element, Use use) {
  if (element == Element::kFloat32) use(float{});
  if (element == Element::kBFloat16) use(__nv_bfloat16{});
  if (element == Element::kFloat16) use(__half{});
}

}  // namespace

int64_t row_pair_count(const Similarities& p) { return p.rows * div_up(p.cols, kTileCols); }
int64_t col_pair_count(const Similarities& p) { return div_up(p.rows, kTileRows) * p.cols; }
int64_t sigmoid_partial_count(const Similarities& p) { return 2 * gradient_tiles(p); }

const char* statistics(Queue queue, const Similarities& p, const float* scale, LsePair* row_pairs,
                       LsePair* col_pairs, const Statistics& out) {
  if (p.rows == 0) return nullptr;
  return submit(queue, [&](cudaStream_t stream) {
    const int64_t row_tiles = div_up(p.rows, kTileRows);
    const unsigned tiles = grid(row_tiles * div_up(p.cols, kTileCols));
    const bool rows = out.row_negatives != nullptr, cols = out.col_max != nullptr;
    const auto kernel = rows && cols ? tile_statistics<true, true>
                        : rows       ? tile_statistics<true, false>
                                     : tile_statistics<false, true>;
    if (tiles > 0 && (rows || cols))
      kernel<<<tiles, kThreads, 0, stream>>>(p, scale, row_pairs, col_pairs);
    finish_rows<<<grid(div_up(p.rows, kWarps)), kThreads, 0, stream>>>(
        p, scale, row_pairs, out.row_negatives, out.positive);
    if (cols && tiles > 0)
      finish_cols<<<grid(div_up(p.cols, kThreads)), kThreads, 0, stream>>>(
          p.cols, row_tiles, col_pairs, out.col_max, out.col_sum);
  });
}

const char* softmax_gradient(Queue queue, const Similarities& p, const float* scale,
                             const double* row_lse, const double* col_lse,
                             const float* positive_gradient, const float* weights,
                             const Output& out) {
  if (p.rows == 0 || p.cols == 0) return nullptr;
  return submit(queue, [&](cudaStream_t stream) {
    with_element(out.element, [&](auto element) {
      write_softmax_gradient<decltype(element)><<<grid(gradient_tiles(p)), kThreads, 0, stream>>>(
          p, scale, row_lse, col_lse, positive_gradient, weights, out);
    });
  });
}

const char* sigmoid(Queue queue, const Similarities& p, const float* scale, const float* bias,
                    float factor, double* partials, double* sums, const Output& out) {
  if (p.rows == 0 || p.cols == 0) return nullptr;
  return submit(queue, [&](cudaStream_t stream) {
    with_element(out.element, [&](auto element) {
      sigmoid_tile<decltype(element)>
          <<<grid(gradient_tiles(p)), kThreads, 0, stream>>>(p, scale, bias, factor, partials, out);
    });
    add_partials<<<1, kThreads, 0, stream>>>(gradient_tiles(p), partials, sums);
  });
}

const char* device_error(int device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && device >= count) error = cudaErrorInvalidDevice;
  return take_error(error);
}

const char* kernel_error(int device) {
  cudaError_t error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess)
    error = cudaFuncGetAttributes(&attributes,
                                  reinterpret_cast<const void*>(&tile_statistics<true, true>));
  return take_error(error);
}

}  // namespace fastvlp::cuda
