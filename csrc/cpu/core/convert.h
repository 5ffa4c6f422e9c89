// Rows of bfloat16 and float16 to float and back, in the instruction set of the file that includes
// this.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../common/element.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

inline float bits_to_float(uint32_t b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return b;
}

inline float half_to_float(uint16_t h) {
  // Shift the half's exponent and mantissa into place, then fix the exponent bias by a
  // multiplication, which also normalises subnormals; infinities and NaN get their exponent set by
  // hand.
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  uint32_t b = float_to_bits(bits_to_float(magnitude) * 5.192296858534828e33f);  // 2^112
  if ((h & 0x7c00) == 0x7c00) b = magnitude | 0x7f800000;
  return bits_to_float(b | static_cast<uint32_t>(h & 0x8000) << 16);
}

// To the nearest, ties to even; what is too large becomes infinity.
inline uint16_t float_to_half(float f) {
  const uint32_t b = float_to_bits(f), sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {
    // Subnormal: adding 1/2 leaves the result in the low bits, rounded by the addition.
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) & 0xffff));
  }
  const uint32_t rounded = magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

inline uint16_t float_to_bfloat16(float f) {
  const uint32_t b = float_to_bits(f);
  const uint32_t rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((b & 0x7fffffff) > 0x7f800000 ? (b >> 16 | 0x40) : rounded);
}

inline void to_floats(const void* in, fastvlp::Element element, int64_t n, float* out) {
  using fastvlp::Element;
  if (element == Element::kFloat32) {
    std::memcpy(out, in, n * 4);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(in);
  int64_t i = 0;
  if (element == Element::kBFloat16) {
    for (; i < n; ++i) out[i] = bits_to_float(static_cast<uint32_t>(from[i]) << 16);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < n; ++i) out[i] = half_to_float(from[i]);
}

inline void from_floats(const float* in, int64_t n, fastvlp::Element element, void* out) {
  using fastvlp::Element;
  if (element == Element::kFloat32) {
    std::memcpy(out, in, n * 4);
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out);
  int64_t i = 0;
  if (element == Element::kBFloat16) {
    for (; i < n; ++i) to[i] = float_to_bfloat16(in[i]);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
#endif
  for (; i < n; ++i) to[i] = float_to_half(in[i]);
}

}  // namespace
