// What the drivers of several operators share: threads, gradients as outputs, and rows in the types
// of their elements.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <functional>

#include "matrix_view.h"

namespace fastvlp {

// Calls body(begin, end) for a partition of [0, n), in parallel.
using Parallel = std::function<void(int64_t n, const std::function<void(int64_t, int64_t)>& body)>;

// A gradient [rows, dim], contiguous.
struct GradientOutput {
  void* data;
  Element element;
};

// function(zero), where the type of `zero` is the element's.
template <class Function>
auto with_element_type(Element element, const Function& function) {
  switch (element) {
    case Element::kFloat32:
      return function(0.0f);
    case Element::kBFloat16:
      return function(c10::BFloat16());
    default:
      return function(c10::Half());
  }
}

// function(row), with the row in the type of its elements.
template <class Function>
auto with_row(const Features& m, int64_t row, const Function& function) {
  return with_element_type(m.element, [&](auto zero) {
    return function(static_cast<const decltype(zero)*>(m.data) + row * m.stride);
  });
}

}  // namespace fastvlp
