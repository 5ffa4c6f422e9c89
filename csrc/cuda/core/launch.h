// Launching kernels and reporting what went wrong; for CUDA sources.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "queue.h"

namespace fastvlp::cuda {

inline const char* message_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The message of an error, which is cleared so that it is not taken for that of a later launch.
inline const char* take_error(cudaError_t error) {
  cudaGetLastError();
  return message_of(error);
}

// Runs `launch(stream)` on the queue's device. The runtime linked into this library is not
// torch's: it has to be told the device itself, and leaves it the driver's current one; the
// caller's DeviceScope (host.h) makes torch put its own back. A failed launch stays the last error
// until asked.
template <class Launch>
const char* submit(Queue queue, Launch launch) {
  if (const char* error = message_of(cudaSetDevice(queue.device))) return error;
  launch(static_cast<cudaStream_t>(queue.stream));
  return message_of(cudaGetLastError());
}

inline unsigned grid(int64_t blocks) { return static_cast<unsigned>(blocks); }

}  // namespace fastvlp::cuda
