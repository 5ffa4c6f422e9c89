// The momentum update, the AdamW step and the search for values that are not finite, over all
// tensors of a model in one launch: a block takes one chunk of one tensor. The arithmetic of an
// element is in common/ema_math.h.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ema.h"
#include "launch.h"

namespace fastvlp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // elements of a thread at a time

// The elements of a chunk that a thread visits, four neighbours at a time.
struct Chunk {
  const TableEntry& entry;
  const Geometry* geometry;
  int64_t begin, end;

  __device__ explicit Chunk(const TableView& table)
      : entry(table.entries[table.chunk_entry[blockIdx.x]]),
        geometry(entry.geometry < 0 ? nullptr : table.geometries + entry.geometry),
        begin((static_cast<int64_t>(blockIdx.x) - entry.first_chunk) * table.chunk_elements),
        end(begin + table.chunk_elements < entry.numel ? begin + table.chunk_elements
                                                       : entry.numel) {}
  __device__ int64_t first() const { return begin + threadIdx.x * kVector; }
  static constexpr int64_t kStep = kThreads * kVector;
};

__device__ __forceinline__ float load(const void* data, Element element, int64_t at) {
  if (element == Element::kFloat32) return static_cast<const float*>(data)[at];
  if (element == Element::kBFloat16)
    return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
  return __half2float(static_cast<const __half*>(data)[at]);
}

__device__ __forceinline__ void store(void* data, Element element, int64_t at, float value) {
  if (element == Element::kFloat32)
    static_cast<float*>(data)[at] = value;
  else if (element == Element::kBFloat16)
    static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(value);
  else
    static_cast<__half*>(data)[at] = __float2half_rn(value);
}

// Four neighbours that begin at a multiple of their own size, in one access.
struct alignas(8) Halves {
  uint16_t bits[kVector];
};

__device__ __forceinline__ bool is_whole(const Chunk& c, const void* data, Element element,
                                         int64_t at) {
  const uintptr_t bytes = element == Element::kFloat32 ? 16 : 8;
  return c.geometry == nullptr && at + kVector <= c.end &&
         reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

__device__ __forceinline__ void load4(const Chunk& c, int list, int64_t at, float* v) {
  const void* data = c.entry.data[list];
  const Element element = c.entry.element[list];
  if (is_whole(c, data, element, at)) {
    if (element == Element::kFloat32) {
      const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + at);
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
      return;
    }
    const Halves four = *reinterpret_cast<const Halves*>(static_cast<const uint16_t*>(data) + at);
#pragma unroll
    for (int k = 0; k < kVector; ++k) v[k] = load(four.bits, element, k);
    return;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    v[k] = 0.0f;
    if (at + k < c.end)
      v[k] = load(data, element, c.geometry ? offset_of(*c.geometry, list, at + k) : at + k);
  }
}

// Nothing where the list is absent.
__device__ __forceinline__ void store4(const Chunk& c, int list, int64_t at, const float* v) {
  void* data = c.entry.data[list];
  if (data == nullptr) return;
  const Element element = c.entry.element[list];
  if (is_whole(c, data, element, at)) {
    if (element == Element::kFloat32) {
      *reinterpret_cast<float4*>(static_cast<float*>(data) + at) = float4{v[0], v[1], v[2], v[3]};
      return;
    }
    Halves four;
#pragma unroll
    for (int k = 0; k < kVector; ++k) store(four.bits, element, k, v[k]);
    *reinterpret_cast<Halves*>(static_cast<uint16_t*>(data) + at) = four;
    return;
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k)
    if (at + k < c.end)
      store(data, element, c.geometry ? offset_of(*c.geometry, list, at + k) : at + k, v[k]);
}

// The weights of the update; false where nothing is to be written.
__device__ __forceinline__ bool ready(const Decay& decay, const int64_t* nonfinite,
                                      EmaWeights* weights) {
  if (nonfinite != nullptr && *nonfinite >= 0) return false;
  double value = decay.value;
  if (decay.at != nullptr)
    value = decay.wide ? *static_cast<const double*>(decay.at)
                       : static_cast<double>(*static_cast<const float*>(decay.at));
  *weights = ema_weights(value);
  return is_decay(value);
}

__global__ void __launch_bounds__(kThreads)
    update_ema(TableView table, Decay decay, const int64_t* nonfinite) {
  EmaWeights w;
  if (!ready(decay, nonfinite, &w)) return;
  const Chunk c(table);
  for (int64_t at = c.first(); at < c.end; at += Chunk::kStep) {
    float m[kVector], s[kVector];
    load4(c, kMomentum, at, m);
    load4(c, kSource, at, s);
#pragma unroll
    for (int k = 0; k < kVector; ++k) m[k] = ema(m[k], s[k], w);
    store4(c, kMomentum, at, m);
    store4(c, kMomentumCopy, at, m);
  }
}

__global__ void __launch_bounds__(kThreads)
    step_adamw(TableView table, AdamWFactors factors, Decay decay, const int64_t* nonfinite) {
  EmaWeights w;
  if (!ready(decay, nonfinite, &w)) return;
  const Chunk c(table);
  const bool momentum = c.entry.data[kWeightMomentum] != nullptr;
  for (int64_t at = c.first(); at < c.end; at += Chunk::kStep) {
    float p[kVector], g[kVector], first[kVector], second[kVector], e[kVector];
    load4(c, kWeight, at, p);
    load4(c, kGradient, at, g);
    load4(c, kFirst, at, first);
    load4(c, kSecond, at, second);
    if (momentum) load4(c, kWeightMomentum, at, e);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      adamw(g[k], p[k], first[k], second[k], factors);
      if (momentum) e[k] = ema(e[k], p[k], w);
    }
    store4(c, kWeight, at, p);
    store4(c, kFirst, at, first);
    store4(c, kSecond, at, second);
    store4(c, kWeightCopy, at, p);
    if (momentum) {
      store4(c, kWeightMomentum, at, e);
      store4(c, kWeightMomentumCopy, at, e);
    }
  }
}

__global__ void clear_last(int64_t* last) { *last = -1; }

// The largest position wins, whichever block comes first: an exact, order-free reduction.
__global__ void __launch_bounds__(kThreads)
    find_exceeding(TableView table, float limit, int64_t* last) {
  const Chunk c(table);
  bool found = false;
  for (int64_t at = c.first(); at < c.end; at += Chunk::kStep) {
    float v[kVector];
    load4(c, 0, at, v);
#pragma unroll
    for (int k = 0; k < kVector; ++k) found = found || exceeds(v[k], limit);
  }
  if (found) atomicMax(reinterpret_cast<long long*>(last), static_cast<long long>(c.entry.index));
}

}  // namespace

const char* ema_update(Queue queue, const TableView& table, Decay decay, const int64_t* nonfinite) {
  if (table.chunks == 0) return nullptr;
  return submit(queue, [&](cudaStream_t stream) {
    update_ema<<<grid(table.chunks), kThreads, 0, stream>>>(table, decay, nonfinite);
  });
}

const char* adamw_ema(Queue queue, const TableView& table, const AdamWFactors& factors, Decay decay,
                      const int64_t* nonfinite) {
  if (table.chunks == 0) return nullptr;
  return submit(queue, [&](cudaStream_t stream) {
    step_adamw<<<grid(table.chunks), kThreads, 0, stream>>>(table, factors, decay, nonfinite);
  });
}

const char* last_exceeding(Queue queue, const TableView& table, float limit, int64_t* last) {
  return submit(queue, [&](cudaStream_t stream) {
    clear_last<<<1, 1, 0, stream>>>(last);
    if (table.chunks > 0)
      find_exceeding<<<grid(table.chunks), kThreads, 0, stream>>>(table, limit, last);
  });
}

bool is_capturing(Queue queue) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(static_cast<cudaStream_t>(queue.stream), &status);
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace fastvlp::cuda
