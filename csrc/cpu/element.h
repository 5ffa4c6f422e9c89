// How the kernels see rows of a tensor.
#pragma once

#include <cstdint>

namespace fastvlp {

enum class Element { kFloat32, kBFloat16, kFloat16 };

// [rows, dim] with unit stride along dim.
struct Features {
  const void* data;
  int64_t rows;
  int64_t stride;  // elements from one row to the next
  Element element;
};

}  // namespace fastvlp
