// The random words of fastvlp/ops/cross_attention/dropout.py, a vector of counters at a time:
// Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011).
#pragma once

#include "simd.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

inline VecU splat_u(uint32_t a) { return VecU{} + a; }

// The 64-bit products a * b as high and low halves.
inline void multiply_wide(VecU a, uint32_t b, VecU& high, VecU& low) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi64(b);
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  high = (VecU)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  low = (VecU)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi64x(b);
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  high = (VecU)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (VecU)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

// The four words of each counter (c0, c1, c2, 0).
inline void philox(uint64_t seed, uint32_t c0, VecU c1, uint32_t c2, VecU words[4]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  VecU w0 = splat_u(c0), w1 = c1, w2 = splat_u(c2), w3 = {};
  for (int round = 0; round < 10; ++round) {
    VecU high0, low0, high2, low2;
    multiply_wide(w0, 0xD2511F53u, high0, low0);
    multiply_wide(w2, 0xCD9E8D57u, high2, low2);
    w0 = high2 ^ w1 ^ k0;
    w1 = low2;
    w2 = high0 ^ w3 ^ k1;
    w3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = w0, words[1] = w1, words[2] = w2, words[3] = w3;
}

}  // namespace
