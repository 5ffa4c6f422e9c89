// Software prefetch of what the next task reads while this one computes: rows of a head lie far
// apart, where the hardware prefetcher does not find them, and matmuls leave memory idle.
#pragma once

#include "matrix_view.h"

namespace {

// Key rows of one head: row r is row attended[r] of the features (r where `attended` is null).
struct AttendedRows {
  fastvlp::Features features;
  const int32_t* attended;
  int64_t count;
  int64_t operator[](int64_t r) const { return attended ? attended[r] : r; }

  AttendedRows slice(int64_t first, int64_t length) const {
    AttendedRows part = {features, attended, length};
    if (attended != nullptr) {
      part.attended += first;
    } else {
      const int64_t size = bytes_of(features.element);
      part.features.data = static_cast<const char*>(features.data) + first * features.stride * size;
    }
    return part;
  }
};

// Into the cache of level 1 (locality 3) or 2 (locality 2). Inlined always: GCC takes a function
// that only prefetches for one without effect and drops the call.
template <int locality>
[[gnu::always_inline]] inline void prefetch_row(const AttendedRows& x, int64_t r, int64_t dim) {
  if (r >= x.count) return;
  const int64_t size = bytes_of(x.features.element);
  const char* at = static_cast<const char*>(x.features.data) + x[r] * x.features.stride * size;
  for (int64_t b = 0; b < dim * size; b += 64) __builtin_prefetch(at + b, 0, locality);
}

// Brings rows into L2, spread evenly over `work`, in whatever unit step() counts.
class Prefetcher {
 public:
  void start(int64_t dim, int64_t work) { dim_ = dim, work_ = work, done_ = 0, count_ = 0; }
  void add(const AttendedRows& rows) { sets_[count_++] = {rows, 0}; }
  void step(int64_t work) {
    done_ += work;
    for (int i = 0; i < count_; ++i)
      for (Set& set = sets_[i];
           set.row < set.rows.count && set.row * work_ < set.rows.count * done_; ++set.row)
        prefetch_row<2>(set.rows, set.row, dim_);
  }

 private:
  struct Set {
    AttendedRows rows;
    int64_t row;  // the next one
  };
  Set sets_[4];
  int count_ = 0;
  int64_t dim_ = 0, work_ = 0, done_ = 0;
};

}  // namespace
