// Non-temporal stores, for what nobody reads soon: a line written whole need not be fetched first.
// Call finish_streams() when done.
#pragma once

#include "convert.h"
#include "simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// Any bytes, the whole lines among them by non-temporal stores.
inline void stream_bytes(void* out, const void* in, int64_t bytes) {
#if defined(__SSE2__)
  char* to = static_cast<char*>(out);
  const char* from = static_cast<const char*>(in);
  while (bytes > 0 && reinterpret_cast<uintptr_t>(to) % 64 != 0) {
    const int64_t piece = 64 - static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % 64);
    const int64_t n = piece < bytes ? piece : bytes;
    std::memcpy(to, from, n);
    to += n, from += n, bytes -= n;
  }
  for (; bytes >= 64; to += 64, from += 64, bytes -= 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
    for (int i = 0; i < 64; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
    for (int i = 0; i < 64; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
  }
  out = to, in = from;
#endif
  std::memcpy(out, in, bytes);
}

// Before another thread may read what non-temporal stores have written.
inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Non-temporal where the row is whole lines.
inline void stream_row(const float* in, int64_t n, float* out) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(out) % 64 == 0 && n % kLanes == 0) {
    for (int64_t i = 0; i < n; i += kLanes) _mm512_stream_ps(out + i, (__m512)load(in + i));
    return;
  }
#endif
  std::memcpy(out, in, n * 4);
}

// The same rounded to bfloat16 (nearest even); non-temporal only if `streams`.
inline void to_bfloat16_row(const float* in, int64_t n, uint16_t* out,
                            [[maybe_unused]] bool streams) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if (streams && reinterpret_cast<uintptr_t>(out) % 64 == 0 && n % (2 * kLanes) == 0) {
    for (; i < n; i += 2 * kLanes)
      _mm512_stream_si512(
          (__m512i*)(out + i),
          (__m512i)_mm512_cvtne2ps_pbh((__m512)load(in + i + kLanes), (__m512)load(in + i)));
    return;
  }
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    store_bf16(reinterpret_cast<uint32_t*>(out + i), load(in + i), load(in + i + kLanes));
#else
  for (; i + kLanes <= n; i += kLanes) {
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    const VecU number = (VecU)load(in + i), upper = number >> 16;
    const VecU rounded = (number + 0x7fffu + (upper & 1u)) >> 16;
    const auto is_nan = (number & 0x7fffffffu) > 0x7f800000u;
    const Halves halves = __builtin_convertvector(is_nan ? upper | 0x40u : rounded, Halves);
    std::memcpy(out + i, &halves, sizeof(halves));
  }
#endif
  for (; i < n; ++i) out[i] = float_to_bfloat16(in[i]);
}

}  // namespace
