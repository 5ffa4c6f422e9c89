// Rows of floats rounded to the half precisions, to nearest even.
#pragma once

#include "simd.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

inline uint32_t bits_of(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return b;
}

inline uint16_t to_bfloat16(float f) {
  const uint32_t b = bits_of(f);
  if ((b & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(b >> 16 | 0x40);  // quiet NaN
  return static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

inline uint16_t to_half(float f) {
  const uint32_t b = bits_of(f), sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more
  if (magnitude < 0x38800000) {  // subnormal: adding 1/2 rounds to units of 2^-24
    float m;
    std::memcpy(&m, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits_of(m + 0.5f) - bits_of(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13);
}

// A copy that goes past the caches, for results nobody reads soon: a line written whole need not be
// fetched first. Call finish_streams() when done.
inline void stream_row(const float* in, int64_t n, float* out) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(out) % 64 == 0 && n % kLanes == 0) {
    for (int64_t i = 0; i < n; i += kLanes) _mm512_stream_ps(out + i, (__m512)load(in + i));
    return;
  }
#endif
  std::memcpy(out, in, n * 4);
}

inline void finish_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// Past the caches as well where rows are whole lines.
inline void to_bfloat16_row(const float* in, int64_t n, uint16_t* out) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if (reinterpret_cast<uintptr_t>(out) % 64 == 0 && n % (2 * kLanes) == 0) {
    for (; i < n; i += 2 * kLanes)
      _mm512_stream_si512((__m512i*)(out + i),
                          (__m512i)_mm512_cvtne2ps_pbh((__m512)load(in + i + kLanes),
                                                       (__m512)load(in + i)));
    return;
  }
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    store_bf16(reinterpret_cast<uint32_t*>(out + i), load(in + i), load(in + i + kLanes));
#endif
  for (; i < n; ++i) out[i] = to_bfloat16(in[i]);
}

inline void to_half_row(const float* in, int64_t n, uint16_t* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i*)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
#endif
  for (; i < n; ++i) out[i] = to_half(in[i]);
}

}  // namespace
