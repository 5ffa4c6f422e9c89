// Scratch and large outputs of the CPU kernels, kept between calls: a training step would otherwise
// fault the same pages in again, which costs as much time as the matmuls that fill them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace fastvlp {

struct BufferDeleter {
  size_t bytes = 0;
  void operator()(float* p) const;
};
// 64-byte aligned, uninitialised, from any thread.
using Buffer = std::unique_ptr<float, BufferDeleter>;
Buffer allocate_floats(int64_t n);

// Frees what is kept for later calls.
void release_buffers();

// Asks for huge pages where none is there yet: fewer faults at the first touch.
void advise_huge_pages(void* p, size_t bytes);

}  // namespace fastvlp
