// How the kernels see rows of a tensor.
#pragma once

#include <cstdint>

#include "../../common/element.h"

namespace fastvlp {

// [rows, dim] with unit stride along dim.
struct Features {
  const void* data;
  int64_t rows;
  int64_t stride;  // elements from one row to the next
  Element element;
};

}  // namespace fastvlp
