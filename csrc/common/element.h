// The element types that the kernels read and write; all arithmetic is float32.
#pragma once

#include <cstdint>

namespace fastvlp {

enum class Element : uint8_t { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t bytes_of(Element e) { return e == Element::kFloat32 ? 4 : 2; }

}  // namespace fastvlp
