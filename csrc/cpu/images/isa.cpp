// Crop, bicubic resize, flip and normalisation of images for one instruction set. Compiled once per
// set with FASTVLP_ISA naming it; everything but the one exported table has internal linkage.
//
// The resize is Pillow's, bit for bit: a horizontal and a vertical pass with an 8-bit image between
// them (newer Pillows begin with the vertical one where the height shrinks by more than twice as
// much as the width), Keys' cubic (a = -1/2) stretched by the reduction so that it also
// antialiases, and weights in fixed point. Files of this operator are compiled without contraction
// of a * b + c, which would round weights and coordinates differently from Pillow.
#include "kernel.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../core/isa_name.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using namespace fastvlp;

constexpr int kBits = 22;         // of a weight's fraction
constexpr int64_t kGroup = 4;     // pixels of a row that are weighted at once
constexpr int64_t kPadding = 16;  // bytes that a load may pass the end of a row by

double cubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

// The weights of the outputs first .. first + n of a pass from `in` to `out` samples: for each
// output `taps` of them (0 past its last), and the input that the first of them belongs to.
int64_t weigh(int64_t in, int64_t out, int64_t first, int64_t n, std::vector<int32_t>& weights,
              std::vector<int64_t>& firsts) {
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  const double stretch = std::max(scale, 1.0), support = 2.0 * stretch, inverse = 1.0 / stretch;
  const auto center = [&](int64_t i) { return (static_cast<double>(first + i) + 0.5) * scale; };
  const auto begin = [&](int64_t i) {
    return std::max<int64_t>(static_cast<int64_t>(center(i) - support + 0.5), 0);
  };
  const auto end = [&](int64_t i) {
    return std::min<int64_t>(static_cast<int64_t>(center(i) + support + 0.5), in);
  };
  int64_t most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, end(i) - begin(i));
  const int64_t taps = (most + kGroup - 1) / kGroup * kGroup;
  weights.assign(n * taps, 0);
  firsts.resize(n);
  std::vector<double> w(most);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t from = begin(i), count = end(i) - from;
    double sum = 0;
    for (int64_t x = 0; x < count; ++x) {
      w[x] = cubic((static_cast<double>(x + from) - center(i) + 0.5) * inverse);
      sum += w[x];
    }
    for (int64_t x = 0; x < count; ++x) {
      const double v = (sum != 0.0 ? w[x] / sum : w[x]) * (1 << kBits);
      weights[i * taps + x] = static_cast<int32_t>(v < 0 ? v - 0.5 : v + 0.5);
    }
    firsts[i] = from;
  }
  return taps;
}

inline uint8_t clipped(int32_t v) {
  v >>= kBits;
  return static_cast<uint8_t>(v < 0 ? 0 : v > 255 ? 255 : v);
}

// The weighted sum of `taps` pixels of a row, red, green, blue and something. Reads up to kPadding
// bytes past the last of them.
#if defined(__AVX2__)
inline __m128i weighted(const uint8_t* pixels, const int32_t* weights, int64_t taps) {
  // Four pixels of three bytes to four of four.
  const __m128i spread = _mm_setr_epi8(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
#if defined(__AVX512BW__)
  const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  __m512i sum = _mm512_setzero_si512();
#else
  const __m256i first = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  const __m256i second = _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3);
  __m256i sum = _mm256_setzero_si256();
#endif
  for (int64_t t = 0; t < taps; t += kGroup) {
    const auto* four = reinterpret_cast<const __m128i*>(pixels + 3 * t);
    const __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128(four), spread);
    const __m128i w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + t));
#if defined(__AVX512BW__)
    const __m512i factors = _mm512_permutexvar_epi32(each, _mm512_castsi128_si512(w));
    sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(_mm512_cvtepu8_epi32(bytes), factors));
#else
    const __m256i w8 = _mm256_castsi128_si256(w);
    const __m256i low =
        _mm256_mullo_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_permutevar8x32_epi32(w8, first));
    const __m256i high = _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)),
                                            _mm256_permutevar8x32_epi32(w8, second));
    sum = _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
#endif
  }
#if defined(__AVX512BW__)
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
#else
  const __m256i half = sum;
#endif
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// The sums in fixed point as four bytes.
inline void store(__m128i sum, uint8_t* out) {
  const __m128i v = _mm_srai_epi32(_mm_add_epi32(sum, _mm_set1_epi32(1 << (kBits - 1))), kBits);
  const int32_t four = _mm_cvtsi128_si32(_mm_packus_epi16(_mm_packs_epi32(v, v), v));
  std::memcpy(out, &four, 4);
}
#else
struct Sums {
  int32_t of[4];
};

inline Sums weighted(const uint8_t* pixels, const int32_t* weights, int64_t taps) {
  Sums sum = {};
  for (int64_t t = 0; t < taps; ++t)
    for (int c = 0; c < 3; ++c) sum.of[c] += pixels[3 * t + c] * weights[t];
  return sum;
}

inline void store(const Sums& sum, uint8_t* out) {
  for (int c = 0; c < 4; ++c) out[c] = clipped(sum.of[c] + (1 << (kBits - 1)));
}
#endif

// One row to `n` output pixels and a byte more.
void resize_row(const uint8_t* row, const int32_t* weights, const int64_t* firsts, int64_t taps,
                int64_t n, uint8_t* out) {
  // The fourth byte is overwritten by the next pixel.
  for (int64_t i = 0; i < n; ++i)
    store(weighted(row + 3 * firsts[i], weights + i * taps, taps), out + 3 * i);
}

// `n` bytes of a row from `taps` rows above one another.
void combine_rows(const uint8_t* rows, int64_t stride, const int32_t* weights, int64_t taps,
                  int64_t n, uint8_t* out) {
  constexpr int64_t kWide = 64;
  const auto block = [&](int64_t x, int64_t m) {
    int32_t sum[kWide];
    for (int64_t j = 0; j < m; ++j) sum[j] = 1 << (kBits - 1);
    for (int64_t t = 0; t < taps; ++t) {
      const uint8_t* in = rows + t * stride + x;
      const int32_t w = weights[t];
      for (int64_t j = 0; j < m; ++j) sum[j] += w * in[j];
    }
    for (int64_t j = 0; j < m; ++j) out[x + j] = clipped(sum[j]);
  };
  int64_t x = 0;
  for (; x + kWide <= n; x += kWide) block(x, kWide);
  if (x < n) block(x, n - x);
}

// The weights of both directions for a window of a view resized to width x height.
struct Passes {
  Passes(const ImageView& in, int64_t width, int64_t height, const Box& window,
         ImageScratch& scratch)
      : view(in), out(window), memory(scratch) {
    across =
        weigh(in.width, width, window.left, window.width, scratch.weights[0], scratch.firsts[0]);
    down =
        weigh(in.height, height, window.top, window.height, scratch.weights[1], scratch.firsts[1]);
    // Weights past an output's last are 0, but the pixels that they meet must exist.
    padding = 3 * across + kPadding;
  }

  void horizontal(const uint8_t* row, uint8_t* to) const {
    resize_row(row, memory.weights[0].data(), memory.firsts[0].data(), across, out.width, to);
  }
  // Output row y from rows of which the first is row `top` of the view.
  void vertical(const uint8_t* rows, int64_t stride, int64_t top, int64_t y, int64_t bytes,
                uint8_t* to) const {
    const int64_t first = memory.firsts[1][y];
    combine_rows(rows + (first - top) * stride, stride, memory.weights[1].data() + y * down,
                 std::min(down, view.height - first), bytes, to);
  }

  const ImageView& view;
  const Box& out;
  ImageScratch& memory;
  int64_t across, down, padding;
};

void across_then_down(const Passes& passes, ImageScratch& scratch) {
  const ImageView& in = passes.view;
  const int64_t bytes = 3 * passes.out.width, stride = bytes + 1;
  const int64_t top = scratch.firsts[1].front();
  const int64_t bottom = std::min(in.height, scratch.firsts[1].back() + passes.down);
  scratch.columns.resize((bottom - top) * stride);
  scratch.row.resize(3 * in.width + passes.padding);
  for (int64_t y = top; y < bottom; ++y) {
    std::memcpy(scratch.row.data(), in.data + y * in.stride, 3 * in.width);
    passes.horizontal(scratch.row.data(), scratch.columns.data() + (y - top) * stride);
  }
  for (int64_t y = 0; y < passes.out.height; ++y)
    passes.vertical(scratch.columns.data(), stride, top, y, bytes, scratch.kept.data() + y * bytes);
}

void down_then_across(const Passes& passes, ImageScratch& scratch) {
  const ImageView& in = passes.view;
  scratch.row.resize(3 * in.width + passes.padding);
  for (int64_t y = 0; y < passes.out.height; ++y) {
    passes.vertical(in.data, in.stride, 0, y, 3 * in.width, scratch.row.data());
    passes.horizontal(scratch.row.data(), scratch.kept.data() + y * 3 * passes.out.width);
  }
}

// The window of a view resized to width x height, in scratch.kept.
ImageView resized(const ImageView& in, int64_t width, int64_t height, const Box& window,
                  bool may_start_down, ImageScratch& scratch) {
  const Passes passes(in, width, height, window, scratch);
  scratch.kept.resize(3 * window.height * window.width + 1);
  if (may_start_down && in.height > height && in.height - height > 2 * (in.width - width))
    down_then_across(passes, scratch);
  else
    across_then_down(passes, scratch);
  return {scratch.kept.data(), 3 * window.width, window.width, window.height};
}

ImageView flipped(const ImageView& in, std::vector<uint8_t>& out) {
  out.resize(3 * in.width * in.height);
  for (int64_t y = 0; y < in.height; ++y) {
    const uint8_t* from = in.data + y * in.stride;
    uint8_t* to = out.data() + 3 * in.width * (y + 1);
    for (int64_t x = 0; x < in.width; ++x) std::memcpy(to -= 3, from + 3 * x, 3);
  }
  return {out.data(), 3 * in.width, in.width, in.height};
}

void normalise(const ImageView& in, bool flip, const float* table, const Plane& out) {
  const int64_t plane = out.width * out.height;
  for (int64_t y = 0; y < in.height; ++y) {
    const uint8_t* from = in.data + y * in.stride;
    float* to = out.data + y * out.width;
    const int64_t step = flip ? -3 : 3;
    if (flip) from += 3 * (in.width - 1);
    for (int64_t x = 0; x < in.width; ++x, from += step) {
      to[x] = table[from[0]];
      to[plane + x] = table[256 + from[1]];
      to[2 * plane + x] = table[512 + from[2]];
    }
    for (int64_t c = 0; c < 3; ++c)
      std::fill(to + c * plane + in.width, to + c * plane + out.width, 0.0f);
  }
  for (int64_t c = 0; c < 3; ++c)
    std::fill(out.data + c * plane + in.height * out.width, out.data + (c + 1) * plane, 0.0f);
}

void transform(const ImageView& image, const ImagePlan& plan, const float* table, const Plane& out,
               ImageScratch& scratch) {
  ImageView view = augmented(image, plan.before, plan.before_count, scratch.images);
  view.data += plan.crop.top * view.stride + 3 * plan.crop.left;
  view.width = plan.crop.width, view.height = plan.crop.height;
  view = resized(view, plan.width, plan.height, plan.window, plan.may_start_down, scratch);
  bool flip = plan.flip;
  if (flip && plan.after_count) {
    view = flipped(view, scratch.columns);
    flip = false;
  }
  view = augmented(view, plan.after, plan.after_count, scratch.images);
  normalise(view, flip, table, out);
}

}  // namespace

namespace fastvlp {

const ImagesKernels& FASTVLP_JOIN(images_kernels_, FASTVLP_ISA)() {
  static const ImagesKernels kernels = {transform};
  return kernels;
}

}  // namespace fastvlp
