// As much of CUDA as csrc/cuda uses, run on the CPU, for tests: the threads of a block are fibers
// that take turns, and meet where the hardware would make them meet. A warp or a block that
// does not meet (a shuffle that some lanes never reach) aborts instead of hanging.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time, and its fibers share one address space

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
template <class T>
void __stwb(T* at, T value) {
  *at = value;
}
struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

using __nv_bfloat16 = c10::BFloat16;
using __half = c10::Half;
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return v; }
inline __half __float2half_rn(float v) { return v; }
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline float __half2float(__half v) { return v; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
struct cudaFuncAttributes {};
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*) {
  return cudaSuccess;
}
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
using cudaEvent_t = void*;
constexpr unsigned cudaEventDisableTiming = 2;
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

namespace emulated {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 64 << 10;

struct Meeting {
  unsigned members = 0, waiting = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool done = false;
};

inline std::vector<Fiber> fibers;
inline std::vector<Meeting> warps;
inline Meeting block;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline bool progress;
inline double exchanged[1024];

inline void open(Meeting& m) {
  m.waiting = 0;
  ++m.generation;
  progress = true;
}

inline void meet(Meeting& m) {
  const unsigned generation = m.generation, own = threadIdx.x;
  if (++m.waiting == m.members) return open(m);
  while (m.generation == generation) {
    swapcontext(&fibers[own].context, &scheduler);
    threadIdx.x = own;
  }
}

inline void leave(Meeting& m) {
  if (--m.members > 0 && m.waiting == m.members) open(m);
}

inline void run_fiber() {
  body();
  fibers[threadIdx.x].done = progress = true;
  leave(warps[threadIdx.x / kLanes]);
  leave(block);
}

inline void run_block(unsigned threads) {
  fibers.resize(threads);
  warps.assign((threads + kLanes - 1) / kLanes, {});
  block = {threads};
  for (unsigned t = 0; t < threads; ++t) {
    ++warps[t / kLanes].members;
    Fiber& fiber = fibers[t];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (progress = true; progress;) {
    progress = false;
    for (unsigned t = 0; t < threads; ++t) {
      if (fibers[t].done) continue;
      threadIdx.x = t;
      swapcontext(&scheduler, &fibers[t].context);
    }
  }
  for (const Fiber& fiber : fibers)
    if (!fiber.done) {
      std::fputs("emulated CUDA: the threads of a block wait for each other for ever\n", stderr);
      std::abort();
    }
}

// What `kernel<<<blocks, threads, shared, stream>>>` becomes.
template <class... Parameters>
auto launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int, cudaStream_t) {
  return [=](Parameters... arguments) {
    body = [&] { kernel(arguments...); };
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(threads);
  };
}

template <class T>
T from_lane(T value, unsigned lane) {
  const unsigned own = threadIdx.x, first = own / kLanes * kLanes;
  std::memcpy(&exchanged[own], &value, sizeof(T));
  meet(warps[own / kLanes]);
  if (lane < kLanes) std::memcpy(&value, &exchanged[first + lane], sizeof(T));
  meet(warps[own / kLanes]);
  return value;
}

}  // namespace emulated

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::from_lane(value, threadIdx.x % emulated::kLanes ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  return emulated::from_lane(value, threadIdx.x % emulated::kLanes + delta);
}
inline void __syncthreads() { emulated::meet(emulated::block); }
inline void atomicMax(long long* at, long long value) {
  if (*at < value) *at = value;
}
