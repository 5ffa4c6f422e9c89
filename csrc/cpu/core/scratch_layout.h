// Offsets of the buffers that share one piece of scratch memory.
#pragma once

#include <cstdint>

namespace {

struct ScratchLayout {
  int64_t total = 0;  // words

  // The offset of a buffer of so many words, on cache lines of its own.
  int64_t take(int64_t words) {
    const int64_t at = total;
    total += (words + 15) / 16 * 16;
    return at;
  }
};

}  // namespace
