// Vectors of floats in the width of the instruction set this file is compiled for, and the
// transcendental functions the kernels need. Written on GCC/Clang vector extensions: one source
// serves every instruction set. Everything is in an anonymous namespace because the same names are
// compiled several times with different flags and must never be merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Vec __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, kVectorBytes);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, kVectorBytes); }
// Not Vec{} + a: adding to zero keeps the compiler from broadcasting straight from memory.
inline Vec splat(float a) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(a);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(a);
#else
  return Vec{a, a, a, a};
#endif
}
inline VecI bits(Vec v) { return (VecI)v; }
// 2^n for the integer n in the low bits of `shifted` = 1.5 * 2^23 + n: moved into the exponent
// field. Unsigned, so that an n out of range gives some float and not an overflow.
inline Vec power_of_two(Vec shifted) { return (Vec)(((VecU)shifted << 23) + (127u << 23)); }

// NaN in `a` is ignored and NaN in `b` is kept, as the callers need for running maxima: a NaN
// logit still reaches the sum of exponentials.
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

#if defined(__AVX512F__)
inline float horizontal_max(Vec v) { return _mm512_reduce_max_ps((__m512)v); }
inline float horizontal_sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
#else
inline float horizontal_max(Vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
inline float horizontal_sum(Vec v) {
  // Pairwise, so that the rounding error grows with log2 of the lanes.
  float t[kLanes];
  std::memcpy(t, &v, kVectorBytes);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) t[i] += t[i + half];
  return t[0];
}
#endif

// exp(x) for x up to 88, within 2 ulp; 0 below -87 (a float there is smaller than 2e-38); NaN stays
// NaN. Reduction x = n ln 2 + r, |r| <= ln 2 / 2, then a minimax polynomial of degree 6
// in r (relative error 3e-9).
inline Vec exp(Vec x) {
  const Vec floor = splat(-87.33f);
  const Vec clamped = x < floor ? floor : x;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec shifted = clamped * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  Vec r = clamped - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  Vec p = splat(1.381461039e-3f);
  p = p * r + 8.368711266e-3f;
  p = p * r + 4.166838750e-2f;
  p = p * r + 1.666652068e-1f;
  p = p * r + 4.999999345e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return x < floor ? splat(0.0f) : p * power_of_two(shifted);
}

// 2^x within 2 ulp, 0 far below the smallest float and at -inf; NaN stays NaN. For x up to 127.
// Reduction x = n + r, |r| <= 1/2, then a minimax polynomial of degree 6 that is exactly 1 at r = 0
// (relative error 2e-9).
inline Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
  const Vec r = (Vec)_mm512_reduce_ps((__m512)x, 0);  // 0 for infinities
#else
  const Vec floor = splat(-126.0f);
  const Vec clamped = x < floor ? floor : x;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec shifted = clamped + magic;
  const Vec r = clamped - (shifted - magic);
#endif
  Vec p = splat(1.5353362e-4f);
  p = p * r + 1.3398875e-3f;
  p = p * r + 9.6184369e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512DQ__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)(x - r));
#else
  return x < floor ? splat(0.0f) : p * power_of_two(shifted);
#endif
}

inline Vec absolute(Vec x) { return (Vec)(bits(x) & 0x7fffffff); }

// log(1 + u) for u in [0, 1], relatively exact: 2 atanh(s) with s = u / (2 + u) <= 1/3.
inline Vec log1p_unit(Vec u) {
  const Vec s = u / (u + 2.0f);
  const Vec q = s * s;
  Vec p = splat(1.0f / 17.0f);
  p = p * q + 1.0f / 15.0f;
  p = p * q + 1.0f / 13.0f;
  p = p * q + 1.0f / 11.0f;
  p = p * q + 1.0f / 9.0f;
  p = p * q + 1.0f / 7.0f;
  p = p * q + 1.0f / 5.0f;
  p = p * q + 1.0f / 3.0f;
  p = p * q + 1.0f;
  return (s + s) * p;
}

// out[i * stride + j] = rows[j], lane i.
#if defined(__AVX512F__)
inline void store_transposed(const Vec rows[kLanes], uint32_t* out, int64_t stride) {
  __m512i t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int half = 0; half < 2; ++half) {
      u[i + 2 * half] = _mm512_unpacklo_epi64(t[i + half], t[i + 2 + half]);
      u[i + 2 * half + 1] = _mm512_unpackhi_epi64(t[i + half], t[i + 2 + half]);
    }
  // u[4 g + c] holds, in quarter q, column 4 q + c of rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(u[c], u[4 + c], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(u[c], u[4 + c], 0xee);
    const __m512i d = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0x44);
    const __m512i e = _mm512_shuffle_i32x4(u[8 + c], u[12 + c], 0xee);
    _mm512_storeu_si512(out + c * stride, _mm512_shuffle_i32x4(a, d, 0x88));
    _mm512_storeu_si512(out + (4 + c) * stride, _mm512_shuffle_i32x4(a, d, 0xdd));
    _mm512_storeu_si512(out + (8 + c) * stride, _mm512_shuffle_i32x4(b, e, 0x88));
    _mm512_storeu_si512(out + (12 + c) * stride, _mm512_shuffle_i32x4(b, e, 0xdd));
  }
}
#elif defined(__AVX2__)
inline void store_transposed(const Vec rows[kLanes], uint32_t* out, int64_t stride) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int half = 0; half < 2; ++half) {
      const __m256d a = (__m256d)t[i + half], b = (__m256d)t[i + 2 + half];
      u[i + 2 * half] = (__m256)_mm256_unpacklo_pd(a, b);
      u[i + 2 * half + 1] = (__m256)_mm256_unpackhi_pd(a, b);
    }
  // u[4 g + c] holds, in half h, column 4 h + c of rows 4 g to 4 g + 3.
  float* to = reinterpret_cast<float*>(out);
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(to + c * stride, _mm256_permute2f128_ps(u[c], u[4 + c], 0x20));
    _mm256_storeu_ps(to + (4 + c) * stride, _mm256_permute2f128_ps(u[c], u[4 + c], 0x31));
  }
}
#else
inline void store_transposed(const Vec rows[kLanes], uint32_t* out, int64_t stride) {
  for (int j = 0; j < kLanes; ++j)
    for (int i = 0; i < kLanes; ++i) out[i * stride + j] = static_cast<uint32_t>(bits(rows[j])[i]);
}
#endif

#if defined(__AVX512BF16__)
// Two vectors rounded to bfloat16 (nearest even), as pairs: the low half of each 32-bit lane from
// `low`, the high half from `high`.
inline Vec bf16_pairs(Vec low, Vec high) {
  const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec)_mm512_permutexvar_epi16(order, packed);
}
inline void store_bf16_pairs(uint32_t* p, Vec low, Vec high) {
  _mm512_storeu_si512(p, (__m512i)bf16_pairs(low, high));
}

// Two neighbouring vectors rounded to bfloat16 (nearest even) in their own order.
inline void store_bf16(uint32_t* p, Vec first, Vec second) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
#endif

}  // namespace
