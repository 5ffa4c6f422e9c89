// The element types that the kernels read and write; all arithmetic is float32.
#pragma once

#include <cstdint>

namespace fastvlp {

enum class Element : uint8_t { kFloat32, kBFloat16, kFloat16 };

}  // namespace fastvlp
