// Lists of tensors as the multi-tensor kernels see them: entry i holds the i-th tensor of every
// list, cut into chunks that are shared out among threads or blocks. No torch types here.
#pragma once

#include <cstdint>

#include "element.h"
#include "host_device.h"

namespace fastvlp {

constexpr int kMaxLists = 7;
constexpr int kMaxDims = 8;

// Where the tensors of an entry do not lie in memory in one same order without gaps.
struct Geometry {
  int32_t dims;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxLists][kMaxDims];  // in elements
};

struct TableEntry {
  void* data[kMaxLists];  // null: the list is absent
  int64_t numel;
  int64_t first_chunk;
  int32_t geometry;  // index of its Geometry; -1: element i of every tensor lies at data + i
  int32_t index;     // position in the caller's lists
  Element element[kMaxLists];
};

struct TableView {
  const TableEntry* entries;
  const Geometry* geometries;
  const int32_t* chunk_entry;  // [chunks]
  int64_t chunks;
  int64_t chunk_elements;
  bool some_flat;     // whether there are entries without a geometry,
  bool some_strided;  // and with one
};

// Where element `index`, counted along the last dimension first, lies in the tensor of `list`.
FASTVLP_HD int64_t offset_of(const Geometry& g, int list, int64_t index) {
  int64_t offset = 0;
  for (int d = g.dims - 1; d >= 0; --d) {
    offset += index % g.sizes[d] * g.strides[list][d];
    index /= g.sizes[d];
  }
  return offset;
}

// The positions of the lists in an entry.
enum EmaList { kMomentum, kSource, kMomentumCopy, kEmaLists };
enum AdamWList {
  kWeight,
  kGradient,
  kFirst,
  kSecond,
  kWeightMomentum,
  kWeightCopy,
  kWeightMomentumCopy,
  kAdamWLists
};
static_assert(static_cast<int>(kAdamWLists) <= kMaxLists);

}  // namespace fastvlp
