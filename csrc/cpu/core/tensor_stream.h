// Blocks of a multi-tensor kernel's streams as floats: converted, gathered and scattered where a
// tensor is not float32 or not laid out like its neighbours.
#pragma once

#include <cstring>

#include "../../common/tensor_table.h"
#include "convert.h"
#include "nontemporal_store.h"

namespace {

using fastvlp::Element;
using fastvlp::Geometry;
using fastvlp::TableEntry;

// Elements at a time: the blocks of all streams together fit into L1, and the
// requests for the block after next, made a block at a time, into the line fill buffers.
constexpr int kBlock = 128;
constexpr int kPrefetchBytes = 1024;

inline void* address(void* data, Element element, int64_t offset) {
  return static_cast<char*>(data) + offset * bytes_of(element);
}

// Calls body(index in the block, offset, elements, stride) for each run along the last dimension.
template <class Body>
void for_each_run(const Geometry& g, int list, int64_t at, int n, Body body) {
  const int last = g.dims - 1;
  for (int i = 0; i < n;) {
    const int64_t index = at + i;
    const int64_t left = g.sizes[last] - index % g.sizes[last];
    const int run = static_cast<int>(left < n - i ? left : n - i);
    body(i, fastvlp::offset_of(g, list, index), run, g.strides[list][last]);
    i += run;
  }
}

// One tensor of an entry, a block at a time.
class Block {
 public:
  Block(const TableEntry& entry, const Geometry* geometry, int list)
      : data_(entry.data[list]), element_(entry.element[list]), geometry_(geometry), list_(list) {}

  bool present() const { return data_ != nullptr; }

  // The values of elements [at, at + n), to be changed at will until `store`.
  float* load(int64_t at, int n) {
    if (geometry_ == nullptr) prefetch(at, n);
    if (geometry_ == nullptr && element_ == Element::kFloat32)
      return static_cast<float*>(address(data_, element_, at));
    if (geometry_ == nullptr) {
      to_floats(address(data_, element_, at), element_, n, values_);
    } else {
      for_each_run(*geometry_, list_, at, n, [&](int i, int64_t offset, int run, int64_t stride) {
        for (int k = 0; k < run; ++k)
          to_floats(address(data_, element_, offset + k * stride), element_, 1, values_ + i + k);
      });
    }
    return values_;
  }

  // Writes values that `load` gave.
  void store(int64_t at, int n, const float* values) {
    if (values != values_) return;  // changed where they lie
    if (geometry_ == nullptr)
      from_floats(values, n, element_, address(data_, element_, at));
    else
      scatter(at, n, values);
  }

  // Writes the values of another stream, by non-temporal stores; nothing where the list is absent.
  void stream(int64_t at, int n, const float* values) {
    if (data_ == nullptr) return;
    if (geometry_ != nullptr) return scatter(at, n, values);
    const void* from = values;
    if (element_ != Element::kFloat32) {
      from_floats(values, n, element_, values_);
      from = values_;
    }
    stream_bytes(address(data_, element_, at), from, n * bytes_of(element_));
  }

 private:
  // The hardware prefetcher stops at the end of each page.
  void prefetch(int64_t at, int n) const {
    const char* from = static_cast<const char*>(address(data_, element_, at)) + kPrefetchBytes;
    const int bytes = n * bytes_of(element_);
    for (int b = 0; b < bytes; b += 64) __builtin_prefetch(from + b);
  }

  void scatter(int64_t at, int n, const float* values) {
    for_each_run(*geometry_, list_, at, n, [&](int i, int64_t offset, int run, int64_t stride) {
      for (int k = 0; k < run; ++k)
        from_floats(values + i + k, 1, element_, address(data_, element_, offset + k * stride));
    });
  }

  void* data_;
  Element element_;
  const Geometry* geometry_;
  int list_;
  alignas(64) float values_[kBlock];
};

}  // namespace
