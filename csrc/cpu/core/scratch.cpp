#include "scratch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace fastvlp {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmallest = size_t{128} << 10;  // malloc reuses smaller blocks by itself
constexpr size_t kMostKept = size_t{160} << 20;  // logits of a chunk, packed features, gradients

struct Block {
  float* p;
  size_t bytes;
};

std::mutex mutex;
std::vector<Block>& kept() {
  // Oldest first. Never destroyed: a tensor may give its memory back while the process ends.
  static auto& blocks = *new std::vector<Block>;
  return blocks;
}

Block take_kept(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto best = kept().end();
  for (auto it = kept().begin(); it != kept().end(); ++it)
    if (it->bytes >= bytes && it->bytes <= 2 * bytes &&
        (best == kept().end() || it->bytes < best->bytes))
      best = it;
  if (best == kept().end()) return {nullptr, 0};
  const Block found = *best;
  kept().erase(best);
  return found;
}

}  // namespace

void advise_huge_pages(void* p, size_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

Buffer allocate_floats(int64_t n) {
  const size_t bytes = (static_cast<size_t>(std::max<int64_t>(n, 1)) * 4 + 63) / 64 * 64;
  if (bytes >= kSmallest)
    if (const Block found = take_kept(bytes); found.p != nullptr)
      return Buffer(found.p, BufferDeleter{found.bytes});
  void* p = std::aligned_alloc(64, bytes);
  if (p == nullptr) throw std::bad_alloc();
  advise_huge_pages(p, bytes);
  return Buffer(static_cast<float*>(p), BufferDeleter{bytes});
}

void BufferDeleter::operator()(float* p) const {
  if (bytes < kSmallest || bytes > kMostKept) {
    std::free(p);
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  kept().push_back({p, bytes});
  size_t total = 0;
  for (const Block& block : kept()) total += block.bytes;
  while (total > kMostKept) {
    total -= kept().front().bytes;
    std::free(kept().front().p);
    kept().erase(kept().begin());
  }
}

void release_buffers() {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Block& block : kept()) std::free(block.p);
  kept().clear();
}

}  // namespace fastvlp
