// From lists of tensors to the table of a multi-tensor kernel: validation, and a cache, so that a
// step whose tensors lie where they lay before builds nothing. Host code, torch's stable ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstddef>
#include <list>
#include <memory>
#include <mutex>
#include <numeric>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "shared_bytes.h"
#include "tensor_element.h"
#include "tensor_table.h"

namespace fastvlp {

using torch::stable::Tensor;

struct TensorList {
  const char* name;
  const std::vector<Tensor>& tensors;
  bool written;
  bool optional;  // may be empty whatever the length of the first list
};

struct HostTable {
  std::vector<TableEntry> entries;
  std::vector<Geometry> geometries;
  std::vector<int32_t> chunk_entry;
  int64_t chunk_elements = 0;

  TableView view() const {
    auto flat = [](const TableEntry& entry) { return entry.geometry < 0; };
    return {entries.data(),
            geometries.data(),
            chunk_entry.data(),
            static_cast<int64_t>(chunk_entry.size()),
            chunk_elements,
            std::any_of(entries.begin(), entries.end(), flat),
            !std::all_of(entries.begin(), entries.end(), flat)};
  }
};

// Everything the table depends on: addresses, dtypes, shapes, strides and devices.
using Signature = std::vector<int64_t>;

namespace lists {

inline Signature signature_of(const std::vector<TensorList>& given) {
  size_t numbers = 0;
  for (const TensorList& list : given) numbers += 1 + 8 * list.tensors.size();
  Signature s;
  s.reserve(numbers);  // of tensors with up to three dimensions
  for (const TensorList& list : given) {
    s.push_back(static_cast<int64_t>(list.tensors.size()));
    for (const Tensor& t : list.tensors) {
      const auto sizes = t.sizes(), strides = t.strides();
      s.push_back(static_cast<int64_t>(reinterpret_cast<intptr_t>(t.data_ptr())));
      s.push_back(static_cast<int64_t>(t.scalar_type()) << 32 |
                  static_cast<int64_t>(t.get_device() + 1) << 16 |
                  static_cast<int64_t>(sizes.size()));
      s.insert(s.end(), sizes.begin(), sizes.end());
      s.insert(s.end(), strides.begin(), strides.end());
    }
  }
  return s;
}

// The dimensions of `t` longer than one, by falling stride.
inline std::vector<int> order_of(const Tensor& t) {
  std::vector<int> dims;
  for (int d = 0; d < static_cast<int>(t.dim()); ++d)
    if (t.size(d) > 1) dims.push_back(d);
  std::stable_sort(dims.begin(), dims.end(),
                   [&](int a, int b) { return t.stride(a) > t.stride(b); });
  return dims;
}

enum class Memory { kDense, kGaps, kOverlaps };

// Whether the elements of `t` fill its memory, leave gaps, or may lie on one another.
inline Memory memory_of(const Tensor& t, const std::vector<int>& order) {
  int64_t extent = 1;
  bool dense = true;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    if (t.stride(*d) < extent) return Memory::kOverlaps;
    dense = dense && t.stride(*d) == extent;
    extent += (t.size(*d) - 1) * t.stride(*d);
  }
  return dense ? Memory::kDense : Memory::kGaps;
}

inline bool same_strides(const Tensor& a, const Tensor& b, const std::vector<int>& dims) {
  return std::all_of(dims.begin(), dims.end(), [&](int d) { return a.stride(d) == b.stride(d); });
}

// Checks the i-th tensors and describes them; the geometry is left for the caller to place.
inline TableEntry entry_of(const std::vector<TensorList>& given, size_t i, Geometry& geometry) {
  const Tensor& first = given[0].tensors[i];
  TableEntry entry = {};
  entry.numel = first.numel();
  entry.index = static_cast<int32_t>(i);
  entry.geometry = -1;
  const std::vector<int> order = order_of(first);
  if (memory_of(first, order) != Memory::kDense) entry.geometry = 0;
  for (size_t l = 0; l < given.size(); ++l) {
    if (given[l].tensors.empty()) continue;
    const Tensor& t = given[l].tensors[i];
    const char* name = given[l].name;
    const auto sizes = t.sizes(), wanted = first.sizes();
    STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end()), name, "[",
                    i, "]: expected the shape of ", given[0].name, "[", i, "]");
    STD_TORCH_CHECK(t.get_device() == given[0].tensors[0].get_device(), name, "[", i,
                    "]: expected the device of ", given[0].name, "[0]");
    STD_TORCH_CHECK(!given[l].written || memory_of(t, order_of(t)) != Memory::kOverlaps, name, "[",
                    i, "]: expected every element at an address of its own");
    entry.element[l] = element_of(t, name, "[", i, "]");
    entry.data[l] = t.data_ptr();
    if (!same_strides(first, t, order)) entry.geometry = 0;
    for (size_t d = 0; d < order.size() && d < kMaxDims; ++d)
      geometry.strides[l][d] = t.stride(order[d]);
  }
  if (entry.geometry < 0) return entry;
  STD_TORCH_CHECK(order.size() <= kMaxDims, given[0].name, "[", i, "]: expected at most ", kMaxDims,
                  " dimensions where tensors are not laid out alike");
  geometry.dims = static_cast<int32_t>(order.size());
  for (size_t d = 0; d < order.size(); ++d) geometry.sizes[d] = first.size(order[d]);
  return entry;
}

// Two entries may share what they write only by being the same in every list (tied parameters):
// the second one is dropped.
inline void drop_tied(const std::vector<TensorList>& given, std::vector<TableEntry>& entries,
                      const std::vector<Geometry>& geometries) {
  std::unordered_map<void*, const TableEntry*> seen;
  std::vector<TableEntry> kept;
  auto same = [&](const TableEntry& a, const TableEntry& b) {
    if (a.numel != b.numel || (a.geometry < 0) != (b.geometry < 0)) return false;
    for (size_t l = 0; l < given.size(); ++l) {
      if (a.data[l] != b.data[l] || a.element[l] != b.element[l]) return false;
      if (a.geometry < 0) continue;
      const Geometry &g = geometries[a.geometry], &h = geometries[b.geometry];
      if (g.dims != h.dims || !std::equal(g.strides[l], g.strides[l] + g.dims, h.strides[l]) ||
          !std::equal(g.sizes, g.sizes + g.dims, h.sizes))
        return false;
    }
    return true;
  };
  for (const TableEntry& entry : entries) {
    const auto [at, fresh] = seen.emplace(entry.data[0], &entry);
    if (fresh) {
      kept.push_back(entry);
      continue;
    }
    STD_TORCH_CHECK(same(*at->second, entry), given[0].name, "[", entry.index,
                    "]: shares memory with ", given[0].name, "[", at->second->index,
                    "], so expected the same tensors at that position in the other lists");
  }
  entries = std::move(kept);
}

// A tensor of an entry, and its place in the lists.
struct Place {
  View view;
  uintptr_t end;
  Element element;
  int32_t index;
  size_t list;
  bool written;
};

inline View view_of(const TableEntry& entry, const std::vector<Geometry>& geometries, size_t list) {
  const int64_t bytes = bytes_of(entry.element[list]);
  View view = {reinterpret_cast<uintptr_t>(entry.data[list]), bytes, 1, {entry.numel}, {bytes}};
  if (entry.geometry < 0) return view;
  const Geometry& geometry = geometries[entry.geometry];
  view.dims = geometry.dims;
  for (int d = 0; d < view.dims; ++d) {
    view.sizes[d] = geometry.sizes[d];
    view.strides[d] = geometry.strides[list][d] * bytes;
  }
  return view;
}

inline bool same_view(const View& a, const View& b) {
  return a.first == b.first && a.element == b.element && a.dims == b.dims &&
         std::equal(a.sizes, a.sizes + a.dims, b.sizes) &&
         std::equal(a.strides, a.strides + a.dims, b.strides);
}

// The tensors of all entries by address. One that stands twice in its entry and is written once (a
// source that is its own momentum) is read and written element by element, which is safe: it is
// one.
inline std::vector<Place> places_of(const std::vector<TensorList>& given,
                                    const std::vector<TableEntry>& entries,
                                    const std::vector<Geometry>& geometries) {
  std::vector<Place> places;
  for (const TableEntry& entry : entries) {
    const size_t own = places.size();
    for (size_t l = 0; l < given.size(); ++l) {
      if (entry.data[l] == nullptr) continue;
      const View view = view_of(entry, geometries, l);
      auto same = std::find_if(places.begin() + own, places.end(), [&](const Place& p) {
        return same_view(p.view, view) && p.element == entry.element[l] &&
               !(p.written && given[l].written);
      });
      if (same != places.end())
        same->written = same->written || given[l].written;
      else
        places.push_back({view, view.end(), entry.element[l], entry.index, l, given[l].written});
    }
  }
  std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) {
    return std::tie(a.view.first, a.end, a.index, a.list) <
           std::tie(b.view.first, b.end, b.index, b.list);
  });
  return places;
}

// Nothing written may share a byte with anything else: chunks run in any order.
inline void check_apart(const std::vector<TensorList>& given,
                        const std::vector<TableEntry>& entries,
                        const std::vector<Geometry>& geometries) {
  std::vector<Place> before;  // that reach to the present place
  for (const Place& place : places_of(given, entries, geometries)) {
    before.erase(std::remove_if(before.begin(), before.end(),
                                [&](const Place& p) { return p.end <= place.view.first; }),
                 before.end());
    for (const Place& other : before)
      STD_TORCH_CHECK(!(place.written || other.written) || !share_bytes(place.view, other.view),
                      given[place.list].name, "[", place.index, "]: overlaps ",
                      given[other.list].name, "[", other.index, "], and one of them is written");
    before.push_back(place);
  }
}

inline HostTable build(const std::vector<TensorList>& given, int64_t chunk_elements) {
  const size_t n = given[0].tensors.size();
  for (const TensorList& list : given)
    STD_TORCH_CHECK(list.tensors.size() == n || (list.optional && list.tensors.empty()), list.name,
                    ": expected ", n, " tensors as in ", given[0].name, ", got ",
                    list.tensors.size());
  HostTable table;
  table.chunk_elements = chunk_elements;
  for (size_t i = 0; i < n; ++i) {
    Geometry geometry = {};
    TableEntry entry = entry_of(given, i, geometry);
    if (entry.numel == 0) continue;
    if (entry.geometry >= 0) {
      entry.geometry = static_cast<int32_t>(table.geometries.size());
      table.geometries.push_back(geometry);
    }
    table.entries.push_back(entry);
  }
  if (std::any_of(given.begin(), given.end(), [](const TensorList& l) { return l.written; })) {
    drop_tied(given, table.entries, table.geometries);
    check_apart(given, table.entries, table.geometries);
  }
  for (size_t e = 0; e < table.entries.size(); ++e) {
    TableEntry& entry = table.entries[e];
    entry.first_chunk = static_cast<int64_t>(table.chunk_entry.size());
    const int64_t chunks = (entry.numel + chunk_elements - 1) / chunk_elements;
    table.chunk_entry.insert(table.chunk_entry.end(), chunks, static_cast<int32_t>(e));
  }
  return table;
}

}  // namespace lists

// The tables of the latest calls, each with what `Extra` the caller keeps with it.
template <class Extra>
class TableCache {
 public:
  struct Item {
    Signature signature;
    HostTable table;
    Extra extra;
  };

  // Null where no call had these tensors.
  std::shared_ptr<Item> find(const std::vector<TensorList>& given) {
    const Signature signature = lists::signature_of(given);
    const std::lock_guard<std::mutex> hold(mutex_);
    return find(signature);
  }

  std::shared_ptr<Item> find_or_build(const std::vector<TensorList>& given,
                                      int64_t chunk_elements) {
    Signature signature = lists::signature_of(given);
    const std::lock_guard<std::mutex> hold(mutex_);
    if (auto known = find(signature)) return known;
    auto item = std::make_shared<Item>();
    item->table = lists::build(given, chunk_elements);
    item->signature = std::move(signature);
    items_.push_front(item);
    if (items_.size() > kKept) items_.pop_back();
    return item;
  }

 private:
  // Holding the mutex.
  std::shared_ptr<Item> find(const Signature& signature) {
    for (auto at = items_.begin(); at != items_.end(); ++at)
      if ((*at)->signature == signature) {
        items_.splice(items_.begin(), items_, at);
        return items_.front();
      }
    return nullptr;
  }

  static constexpr size_t kKept = 64;
  std::mutex mutex_;
  std::list<std::shared_ptr<Item>> items_;
};

}  // namespace fastvlp
