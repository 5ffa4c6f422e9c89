// What the matmul driver (baseline code, owns memory and threads) and the per-instruction-set
// kernels (no allocation, no threads, no torch) say to each other.
#pragma once

#include <cstdint>

namespace fastvlp {

// A matrix of floats, one of whose strides is 1 (or does not matter).
struct Matrix {
  const float* data;
  int64_t row;  // elements from one row to the next
  int64_t col;
};

// c [m, n] = alpha a [m, k] b [k, n] (+ bias [n]) (+ c where accumulating).
struct MatmulTask {
  Matrix a, b;
  const float* bias;  // null: none
  float* c;
  int64_t c_row;
  int64_t m, n, k;
  float alpha;
  bool accumulate;
};

struct MatmulKernels {
  // Floats of 64-byte aligned scratch for a task of this size.
  int64_t (*scratch_floats)(int64_t m, int64_t n, int64_t k);
  void (*multiply)(const MatmulTask&, float* scratch);
};

}  // namespace fastvlp
