// The momentum update, the AdamW step and the search for values that are not finite, over all
// tensors of a model in one launch: a block takes one chunk of one tensor. The arithmetic of an
// element is in common/ema_math.h.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "../core/launch.h"
#include "../core/vector_store.h"
#include "ema.h"

namespace fastvlp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // elements of a thread at a time

// The elements of a chunk that a thread visits, kWidth neighbours at a time: kVector of an entry
// without gaps, single ones of a strided entry, each of the two by a kernel of its own.
template <int kWidth>
struct Chunk {
  static constexpr bool kStrided = kWidth == 1;
  static constexpr int64_t kStep = kThreads * kWidth;
  const TableEntry& entry;
  const Geometry* geometry;
  int64_t begin, end;

  __device__ explicit Chunk(const TableView& table)
      : entry(table.entries[table.chunk_entry[blockIdx.x]]),
        geometry(table.geometries + entry.geometry),
        begin((static_cast<int64_t>(blockIdx.x) - entry.first_chunk) * table.chunk_elements),
        end(begin + table.chunk_elements < entry.numel ? begin + table.chunk_elements
                                                       : entry.numel) {}
  __device__ bool is_mine() const { return (entry.geometry >= 0) == kStrided; }
  __device__ int64_t first() const { return begin + threadIdx.x * kWidth; }
  __device__ int64_t offset(int list, int64_t at) const {
    return kStrided ? offset_of(*geometry, list, at) : at;
  }
  // Whether the neighbours at `at` are all there, and begin where one access may.
  __device__ bool is_whole(int list, int64_t at) const {
    const uintptr_t bytes = entry.element[list] == Element::kFloat32 ? 16 : 8;
    return !kStrided && at + kWidth <= end &&
           reinterpret_cast<uintptr_t>(entry.data[list]) % bytes == 0;
  }
};

template <class T>
__device__ constexpr Element element_of() {
  return sizeof(T) == 4                          ? Element::kFloat32
         : std::is_same<T, __nv_bfloat16>::value ? Element::kBFloat16
                                                 : Element::kFloat16;
}

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
  unsigned char bytes[8];
};

template <class T>
__device__ __forceinline__ void load_halves(const void* data, int64_t at, float* v) {
  const Halves raw = *reinterpret_cast<const Halves*>(static_cast<const T*>(data) + at);
  T four[kVector];
  memcpy(four, &raw, sizeof(raw));
#pragma unroll
  for (int k = 0; k < kVector; ++k) v[k] = load(four, element_of<T>(), k);
}

template <class T>
__device__ __forceinline__ void store_halves(void* data, int64_t at, const float* v) {
  T four[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) store(four, element_of<T>(), k, v[k]);
  store_four(static_cast<T*>(data) + at, four);
}

template <int kWidth>
__device__ __forceinline__ void load(const Chunk<kWidth>& c, int list, int64_t at, float* v) {
  const void* data = c.entry.data[list];
  const Element element = c.entry.element[list];
  if constexpr (kWidth == kVector) {
    if (c.is_whole(list, at)) {
      if (element == Element::kBFloat16) return load_halves<__nv_bfloat16>(data, at, v);
      if (element == Element::kFloat16) return load_halves<__half>(data, at, v);
      const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + at);
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k)
    v[k] = at + k < c.end ? load(data, element, c.offset(list, at + k)) : 0.0f;
}

// Nothing where the list is absent.
template <int kWidth>
__device__ __forceinline__ void store(const Chunk<kWidth>& c, int list, int64_t at,
                                      const float* v) {
  void* data = c.entry.data[list];
  if (data == nullptr) return;
  const Element element = c.entry.element[list];
  if constexpr (kWidth == kVector) {
    if (c.is_whole(list, at)) {
      if (element == Element::kBFloat16) return store_halves<__nv_bfloat16>(data, at, v);
      if (element == Element::kFloat16) return store_halves<__half>(data, at, v);
      const float four[kVector] = {v[0], v[1], v[2], v[3]};
      store_four(static_cast<float*>(data) + at, four);
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k)
    if (at + k < c.end) store(data, element, c.offset(list, at + k), v[k]);
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

template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    update_ema(TableView table, Decay decay, const int64_t* nonfinite) {
  EmaWeights w;
  if (!ready(decay, nonfinite, &w)) return;
  const Chunk<kWidth> c(table);
  if (!c.is_mine()) return;
  for (int64_t at = c.first(); at < c.end; at += Chunk<kWidth>::kStep) {
    float m[kWidth], s[kWidth];
    load(c, kMomentum, at, m);
    load(c, kSource, at, s);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) m[k] = ema(m[k], s[k], w);
    store(c, kMomentum, at, m);
    store(c, kMomentumCopy, at, m);
  }
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    step_adamw(TableView table, AdamWFactors factors, Decay decay, const int64_t* nonfinite) {
  EmaWeights w;
  if (!ready(decay, nonfinite, &w)) return;
  const Chunk<kWidth> c(table);
  if (!c.is_mine()) return;
  const bool momentum = c.entry.data[kWeightMomentum] != nullptr;
  for (int64_t at = c.first(); at < c.end; at += Chunk<kWidth>::kStep) {
    float p[kWidth], g[kWidth], first[kWidth], second[kWidth], e[kWidth];
    load(c, kWeight, at, p);
    load(c, kGradient, at, g);
    load(c, kFirst, at, first);
    load(c, kSecond, at, second);
    if (momentum) load(c, kWeightMomentum, at, e);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      adamw(g[k], p[k], first[k], second[k], factors);
      if (momentum) e[k] = ema(e[k], p[k], w);
    }
    store(c, kWeight, at, p);
    store(c, kFirst, at, first);
    store(c, kSecond, at, second);
    store(c, kWeightCopy, at, p);
    if (momentum) {
      store(c, kWeightMomentum, at, e);
      store(c, kWeightMomentumCopy, at, e);
    }
  }
}

__global__ void clear_last(int64_t* last) { *last = -1; }

// The largest position wins, whichever block comes first: an exact, order-free reduction.
template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    find_exceeding(TableView table, float limit, int64_t* last) {
  const Chunk<kWidth> c(table);
  if (!c.is_mine()) return;
  bool found = false;
  for (int64_t at = c.first(); at < c.end; at += Chunk<kWidth>::kStep) {
    float v[kWidth];
    load(c, 0, at, v);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) found = found || exceeds(v[k], limit);
  }
  if (found) atomicMax(reinterpret_cast<long long*>(last), static_cast<long long>(c.entry.index));
}

}  // namespace

const char* ema_update(Queue queue, const TableView& table, Decay decay, const int64_t* nonfinite) {
  return submit(queue, [&](cudaStream_t stream) {
    const unsigned blocks = grid(table.chunks);
    if (table.some_flat)
      update_ema<kVector><<<blocks, kThreads, 0, stream>>>(table, decay, nonfinite);
    if (table.some_strided) update_ema<1><<<blocks, kThreads, 0, stream>>>(table, decay, nonfinite);
  });
}

const char* adamw_ema(Queue queue, const TableView& table, const AdamWFactors& factors, Decay decay,
                      const int64_t* nonfinite) {
  return submit(queue, [&](cudaStream_t stream) {
    const unsigned blocks = grid(table.chunks);
    if (table.some_flat)
      step_adamw<kVector><<<blocks, kThreads, 0, stream>>>(table, factors, decay, nonfinite);
    if (table.some_strided)
      step_adamw<1><<<blocks, kThreads, 0, stream>>>(table, factors, decay, nonfinite);
  });
}

const char* last_exceeding(Queue queue, const TableView& table, float limit, int64_t* last) {
  return submit(queue, [&](cudaStream_t stream) {
    clear_last<<<1, 1, 0, stream>>>(last);
    const unsigned blocks = grid(table.chunks);
    if (table.some_flat)
      find_exceeding<kVector><<<blocks, kThreads, 0, stream>>>(table, limit, last);
    if (table.some_strided) find_exceeding<1><<<blocks, kThreads, 0, stream>>>(table, limit, last);
  });
}

bool is_capturing(Queue queue) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(static_cast<cudaStream_t>(queue.stream), &status);
  return status != cudaStreamCaptureStatusNone;
}

Event::~Event() {
  if (event_ != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(event_));
}

const char* Event::record(Queue queue) {
  return submit(queue, [&](cudaStream_t stream) {
    cudaEvent_t event = nullptr;
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    cudaEventRecord(event, stream);
    event_ = event;
  });
}

bool Event::query() const {
  // A query changes nothing, but in any other mode it would invalidate a capture on any stream.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  const cudaError_t found = cudaEventQuery(static_cast<cudaEvent_t>(event_));
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaGetLastError();  // "not ready" counts as one
  return found == cudaSuccess;
}

}  // namespace fastvlp::cuda
