// Where kernels go, in words that need no CUDA header.
#pragma once

namespace fastvlp::cuda {

// Work queued on `stream` (a cudaStream_t) of `device`.
struct Queue {
  int device;
  void* stream;
};

}  // namespace fastvlp::cuda
