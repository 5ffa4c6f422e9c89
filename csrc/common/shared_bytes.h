// Whether two strided views share a byte, exactly: views that interleave, such as the even and the
// odd columns of a matrix, do not. No torch types here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "tensor_table.h"

namespace fastvlp {

// Where the elements of a view lie: `element` bytes at first + sum of i_d strides[d], i_d <
// sizes[d].
struct View {
  uintptr_t first;
  int64_t element;
  int dims;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];  // in bytes, not negative

  uintptr_t end() const {
    int64_t reach = element;
    for (int d = 0; d < dims; ++d) reach += (sizes[d] - 1) * strides[d];
    return first + reach;
  }
};

// The distances from elements of one view to elements of another: the distance of the first ones
// plus a sum of stride_k x_k with whole x_k between bounds. Equal strides of both views are one
// term, so that views of one layout have few distances near 0 whatever their sizes are.
class Distances {
 public:
  Distances(const View& from, const View& to)
      : nearest_(1 - to.element),
        farthest_(from.element - 1),
        first_(static_cast<int64_t>(to.first - from.first)) {
    for (int d = 0; d < from.dims; ++d) add(from.strides[d], 1 - from.sizes[d], 0);
    for (int d = 0; d < to.dims; ++d) add(to.strides[d], 0, to.sizes[d] - 1);
    std::sort(terms_, terms_ + count_,
              [](const Term& a, const Term& b) { return a.stride > b.stride; });
    for (int k = count_ - 1; k >= 0; --k) {
      low_[k] = low_[k + 1] + terms_[k].stride * terms_[k].least;
      high_[k] = high_[k + 1] + terms_[k].stride * terms_[k].most;
      divisor_[k] = std::gcd(divisor_[k + 1], terms_[k].stride);
    }
  }

  // Whether one of them is so small that the two elements share a byte.
  bool any_shares() const { return reaches(0, first_); }

 private:
  struct Term {
    int64_t stride, least, most;
  };

  void add(int64_t stride, int64_t least, int64_t most) {
    if (stride == 0) return;
    Term* term =
        std::find_if(terms_, terms_ + count_, [&](const Term& t) { return t.stride == stride; });
    if (term == terms_ + count_) terms_[count_++] = {stride, 0, 0};
    term->least += least;
    term->most += most;
  }

  static int64_t floor_divided(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

  // Whether terms k and after can take `distance` to where elements share a byte.
  bool reaches(int k, int64_t distance) const {
    const int64_t least = nearest_ - distance, most = farthest_ - distance;
    if (high_[k] < least || low_[k] > most) return false;
    if (k == count_) return true;
    if (floor_divided(most, divisor_[k]) * divisor_[k] < least) return false;
    const Term& term = terms_[k];
    const int64_t from = -floor_divided(high_[k + 1] - least, term.stride);
    const int64_t to = floor_divided(most - low_[k + 1], term.stride);
    for (int64_t x = std::max(from, term.least); x <= std::min(to, term.most); ++x)
      if (reaches(k + 1, distance + x * term.stride)) return true;
    return false;
  }

  int64_t nearest_, farthest_, first_;
  int count_ = 0;
  Term terms_[2 * kMaxDims];
  // Of the sum of terms k and after: its bounds, and what divides it.
  int64_t low_[2 * kMaxDims + 1] = {}, high_[2 * kMaxDims + 1] = {};
  int64_t divisor_[2 * kMaxDims + 1] = {};
};

inline bool share_bytes(const View& a, const View& b) {
  return a.first < b.end() && b.first < a.end() && Distances(a, b).any_shares();
}

}  // namespace fastvlp
