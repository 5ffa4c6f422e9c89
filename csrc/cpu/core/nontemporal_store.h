// Rows of floats written by non-temporal stores, as they are or rounded to bfloat16 (nearest even).
#pragma once

#include "convert.h"
#include "simd.h"

namespace {

// A copy by non-temporal stores, for results nobody reads soon: a line written whole need not be
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

// Non-temporal as well where rows are whole lines.
inline void to_bfloat16_row(const float* in, int64_t n, uint16_t* out) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if (reinterpret_cast<uintptr_t>(out) % 64 == 0 && n % (2 * kLanes) == 0) {
    for (; i < n; i += 2 * kLanes)
      _mm512_stream_si512(
          (__m512i*)(out + i),
          (__m512i)_mm512_cvtne2ps_pbh((__m512)load(in + i + kLanes), (__m512)load(in + i)));
    return;
  }
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    store_bf16(reinterpret_cast<uint32_t*>(out + i), load(in + i), load(in + i + kLanes));
#endif
  for (; i < n; ++i) out[i] = float_to_bfloat16(in[i]);
}

}  // namespace
