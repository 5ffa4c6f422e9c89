// One copy of something in device memory for each stream that uses it. Host code, no CUDA here.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace fastvlp::cuda {

// Work on one stream is ordered, work on two is not: what one of them has copied may not be there
// yet when the other one reads it, and memory that one gives back may be taken anew while the other
// still reads. So each stream reads a copy that it has made itself. Threads may share an object.
template <class Copy>
class StreamCopies {
 public:
  // The copy of `stream`; `make()` makes it where there is none.
  template <class Make>
  std::shared_ptr<Copy> of(void* stream, Make make) {
    const auto is_own = [&](void* owner, const Copy&) { return owner == stream; };
    if (auto found = find(is_own)) return found;
    // Not under the lock: torch may wait for others in there. A copy too many does no harm.
    auto made = std::make_shared<Copy>(make());
    const std::lock_guard<std::mutex> hold(mutex_);
    copies_.emplace_back(stream, made);
    return made;
  }

  // The first copy that suits(stream, copy); null where there is none.
  template <class Suits>
  std::shared_ptr<Copy> find(Suits suits) {
    const std::lock_guard<std::mutex> hold(mutex_);
    for (const auto& [owner, copy] : copies_)
      if (suits(owner, *copy)) return copy;
    return nullptr;
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<void*, std::shared_ptr<Copy>>> copies_;
};

}  // namespace fastvlp::cuda
