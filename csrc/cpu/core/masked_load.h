// Sixteen elements as floats, or the first n of them, 0 <= n: zeros for the others, which are not
// read.
#pragma once

#include "simd.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__)

namespace {

inline __mmask16 first_lanes(int64_t n) {
  return static_cast<__mmask16>(n >= kLanes ? 0xffffu : (1u << n) - 1);
}

inline Vec load_float32(const float* p) { return load(p); }
inline Vec load_float32(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : (Vec)_mm512_maskz_loadu_ps(first_lanes(n), p);
}

inline Vec float16_to_float(__m256i numbers) { return (Vec)_mm512_cvtph_ps(numbers); }
inline Vec load_float16(const uint16_t* p) {
  return float16_to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_float16(const uint16_t* p, int64_t n) {
  return float16_to_float(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}

inline Vec bfloat16_to_float(__m256i numbers) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16);
}
inline Vec load_bfloat16(const uint16_t* p) {
  return bfloat16_to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_bfloat16(const uint16_t* p, int64_t n) {
  return bfloat16_to_float(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}

}  // namespace

#endif
