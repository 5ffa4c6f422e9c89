// Interleaves SIMD work with matmuls on AMX tiles. A tile instruction keeps the matrix unit busy
// for sixteen cycles and the vector units not at all, but the out-of-order window holds only some
// hundred instructions: the work has to come in small pieces between the tile instructions.
//
// A Work class has left(), how many pieces are to be done, and operator()(), which does the next
// one, some two hundred instructions.
#pragma once

#include <cstdint>

namespace {

class Interleaver {
 public:
  // `work` has to outlive finish().
  template <class Work>
  void add(Work& work) {
    if (work.left() <= 0) return;
    jobs_[count_++] = {work.left(), [](void* w) { (*static_cast<Work*>(w))(); }, &work};
    left_ += work.left();
  }

  // Spreads what is left over the next `calls` calls.
  void spread(int64_t calls) {
    rate_ = calls > 0 ? (left_ * kUnit + calls - 1) / calls : 0;
    credit_ = 0;
  }

  [[gnu::always_inline]] void operator()() {
    credit_ += rate_;
    while (credit_ >= kUnit) {
      credit_ -= kUnit;
      run_piece();
    }
  }

  void finish() {
    while (left_ > 0) run_piece();
    count_ = at_ = 0;
  }

 private:
  static constexpr int64_t kUnit = 1024;

  struct Job {
    int64_t pieces;
    void (*run)(void* work);
    void* work;
  };

  [[gnu::always_inline]] void run_piece() {
    Job& job = jobs_[at_];
    job.run(job.work);
    --left_;
    if (--job.pieces == 0 && ++at_ == count_) credit_ = rate_ = 0;
  }

  int64_t rate_ = 0, credit_ = 0, left_ = 0;
  int count_ = 0, at_ = 0;
  Job jobs_[4];
};

}  // namespace
