// Passes over a tile of logits [keys][stacked rows]: running softmax statistics of every row, and
// the weights exp(logit - reference) as the operand of the matmul with the keys.
#pragma once

#include "../gemm/pack.h"
#include "kernel.h"

namespace {

// The dot product that stands for "not a key of this row". Times `scale` it is far below any logit,
// and still finite, because it also gets multiplied by zero.
inline float excluded_dot(float scale) { return scale > 1.0f ? -2e38f / scale : -2e38f; }

// The reference of a row without keys so far: above any excluded logit, below any other.
inline float lowest_reference(float scale) { return 0.5f * excluded_dot(scale) * scale; }

// Raises the references to this tile's maxima. factor[i] = exp(old - new reference).
inline void raise_references(const float* tile, int64_t stride, int64_t keys, int64_t n,
                             float scale, float* reference, float* factor) {
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    Vec first = splat(-__builtin_inff()), second = first;
    for (int64_t j = 0; j < keys; ++j) {
      first = max(load(tile + j * stride + i), first);
      second = max(load(tile + j * stride + i + kLanes), second);
    }
    for (int64_t v = i; v < i + 2 * kLanes; v += kLanes) {
      const Vec old = load(reference + v), raised = max((v == i ? first : second) * scale, old);
      store(factor + v, exp(old - raised));
      store(reference + v, raised);
    }
  }
}

// Whether a logit may exceed what it is compared with: a multiplication that is fused with the
// subtraction of a reference is not rounded, as the reference was.
inline bool beyond_fused_rounding(const float* reference, int64_t n) {
  constexpr float kLargest = 1 << 20;  // a difference of at most 2^-4
  for (int64_t i = 0; i < n; ++i)
    if (reference[i] > kLargest || reference[i] < -kLargest) return true;
  return false;
}

inline void scale_tile(float* tile, int64_t stride, int64_t keys, int64_t n, float scale) {
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t i = 0; i < n; i += kLanes)
      store(tile + j * stride + i, load(tile + j * stride + i) * scale);
}

// Two keys' weights of one vector of rows as the left operand of the matmul: over the
// logits for floats, else as pairs in `out`.
template <class Dot>
inline void store_weights(float* tile, int64_t stride, [[maybe_unused]] uint32_t* out, int64_t j,
                          int64_t i, Vec first, Vec second) {
  if constexpr (Dot::kPerWord == 1) {
    store(tile + j * stride + i, first);
    store(tile + (j + 1) * stride + i, second);
  } else {
#if defined(__AVX512BF16__)
    store_bf16_pairs(out + j / 2 * stride + i, first, second);
#endif
  }
}

// Adds the tile to sum and cross, which are already relative to `reference`. The teachers' rows
// begin `group` rows after their students'.
template <class Dot, bool teacher, bool keep>
void add_exponentials(float* tile, int64_t stride, int64_t keys, int64_t group, float scale,
                      const float* reference, float* sum, float* cross, uint32_t* out) {
  for (int64_t i = 0; i < group; i += kLanes) {
    const int64_t t = i + group;
    const Vec low = load(reference + i);
    const Vec teacher_low = teacher ? load(reference + t) : Vec{};
    Vec total = {}, teacher_total = {}, product = {};
    for (int64_t j = 0; j < keys; j += 2) {
      const Vec z0 = load(tile + j * stride + i) * scale;
      const Vec z1 = load(tile + (j + 1) * stride + i) * scale;
      const Vec e0 = exp(z0 - low), e1 = exp(z1 - low);
      total = total + (e0 + e1);
      if constexpr (keep) store_weights<Dot>(tile, stride, out, j, i, e0, e1);
      if constexpr (teacher) {
        const Vec t0 = exp(load(tile + j * stride + t) * scale - teacher_low);
        const Vec t1 = exp(load(tile + (j + 1) * stride + t) * scale - teacher_low);
        teacher_total = teacher_total + (t0 + t1);
        product = product + t0 * z0;
        product = product + t1 * z1;
        if constexpr (keep) store_weights<Dot>(tile, stride, out, j, t, t0, t1);
      }
    }
    store(sum + i, load(sum + i) + total);
    if constexpr (teacher) {
      store(sum + t, load(sum + t) + teacher_total);
      store(cross + i, load(cross + i) + product);
    }
  }
}

// Rows whose reference rose bring what they have summed so far down to it.
inline void rescale(const float* factor, int64_t rows, int64_t group, int64_t width, float* sum,
                    float* cross, float* keys) {
  for (int64_t i = 0; i < rows; ++i) {
    if (factor[i] == 1.0f) continue;
    sum[i] *= factor[i];
    if (i >= group) cross[i - group] *= factor[i];
    if (keys == nullptr) continue;
    for (int64_t d = 0; d < width; d += kLanes)
      store(keys + i * width + d, load(keys + i * width + d) * factor[i]);
  }
}

}  // namespace
