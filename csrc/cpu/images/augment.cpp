// RandAugment's operations on 8-bit RGB, each with Pillow's arithmetic.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "kernel.h"

namespace fastvlp {
namespace {

using Table = std::array<uint8_t, 256>;
using Histogram = std::array<int64_t, 256>;

uint8_t clip(double v) { return static_cast<uint8_t>(v <= 0 ? 0 : v >= 255 ? 255 : v); }

// Pillow's blend: from a to b, and beyond for factors outside of [0, 1].
uint8_t blend(int a, int b, float factor) {
  const float v = static_cast<float>(a) + factor * static_cast<float>(b - a);
  return static_cast<uint8_t>(v <= 0.0f ? 0 : v >= 255.0f ? 255 : v);
}

int luma(const uint8_t* p) { return (p[0] * 19595 + p[1] * 38470 + p[2] * 7471 + 0x8000) >> 16; }

std::array<Histogram, 3> histograms(const ImageView& in) {
  // Two sets, so that runs of one value do not wait for each other's additions.
  std::array<std::array<Histogram, 3>, 2> counts = {};
  for (int64_t y = 0; y < in.height; ++y) {
    const uint8_t* p = in.data + y * in.stride;
    for (int64_t x = 0; x < in.width; ++x, p += 3)
      for (int c = 0; c < 3; ++c) ++counts[x & 1][c][p[c]];
  }
  for (int c = 0; c < 3; ++c)
    for (int v = 0; v < 256; ++v) counts[0][c][v] += counts[1][c][v];
  return counts[0];
}

Table identity() {
  Table t;
  for (int i = 0; i < 256; ++i) t[i] = static_cast<uint8_t>(i);
  return t;
}

Table stretch(const Histogram& h) {
  int low = 0, high = 255;
  while (low < 255 && !h[low]) ++low;
  while (high > 0 && !h[high]) --high;
  if (high <= low) return identity();
  const double scale = 255.0 / (high - low), offset = -low * scale;
  Table t;
  for (int i = 0; i < 256; ++i) t[i] = clip(i * scale + offset);
  return t;
}

Table equalize(const Histogram& h) {
  int64_t sum = 0, last = 0, kinds = 0;
  for (const int64_t n : h)
    if (n) sum += n, last = n, ++kinds;
  const int64_t step = (sum - last) / 255;
  if (kinds <= 1 || step == 0) return identity();
  Table t;
  int64_t n = step / 2;
  for (int i = 0; i < 256; ++i) {
    t[i] = static_cast<uint8_t>(std::min<int64_t>(n / step, 255));
    n += h[i];
  }
  return t;
}

int mean_luma(const ImageView& in) {
  int64_t sum = 0;
  for (int64_t y = 0; y < in.height; ++y)
    for (int64_t x = 0; x < in.width; ++x) sum += luma(in.data + y * in.stride + 3 * x);
  return static_cast<int>(static_cast<double>(sum) / (in.width * in.height) + 0.5);
}

// The table of an operation that looks at one value at a time; false where it is none of those.
bool table_of(const Operation& op, const ImageView& in, std::array<Table, 3>& tables) {
  Table t;
  const double value = op.values[0];
  const float factor = static_cast<float>(value);
  switch (op.kind) {
    case Augment::kAutoContrast:
    case Augment::kEqualize: {
      const auto counts = histograms(in);
      for (int c = 0; c < 3; ++c)
        tables[c] = op.kind == Augment::kEqualize ? equalize(counts[c]) : stretch(counts[c]);
      return true;
    }
    case Augment::kPosterize: {
      const int kept = std::clamp(static_cast<int>(value), 0, 8);
      for (int i = 0; i < 256; ++i) t[i] = static_cast<uint8_t>(i & ~((1 << (8 - kept)) - 1));
      break;
    }
    case Augment::kSolarize:
      for (int i = 0; i < 256; ++i) t[i] = static_cast<uint8_t>(i < value ? i : 255 - i);
      break;
    case Augment::kSolarizeAdd:
      for (int i = 0; i < 256; ++i) {
        const int v = std::clamp(i + static_cast<int>(value), 0, 255);
        t[i] = static_cast<uint8_t>(v < 128 ? v : 255 - v);
      }
      break;
    case Augment::kContrast: {
      const int grey = mean_luma(in);
      for (int i = 0; i < 256; ++i) t[i] = blend(grey, i, factor);
      break;
    }
    case Augment::kBrightness:
      for (int i = 0; i < 256; ++i) t[i] = blend(0, i, factor);
      break;
    default:
      return false;
  }
  tables.fill(t);
  return true;
}

void look_up(const ImageView& in, const std::array<Table, 3>& tables, uint8_t* out) {
  for (int64_t y = 0; y < in.height; ++y) {
    const uint8_t* p = in.data + y * in.stride;
    for (int64_t x = 0; x < in.width; ++x, p += 3, out += 3)
      for (int c = 0; c < 3; ++c) out[c] = tables[c][p[c]];
  }
}

void color(const ImageView& in, float factor, uint8_t* out) {
  for (int64_t y = 0; y < in.height; ++y) {
    const uint8_t* p = in.data + y * in.stride;
    for (int64_t x = 0; x < in.width; ++x, p += 3, out += 3) {
      const int grey = luma(p);
      for (int c = 0; c < 3; ++c) out[c] = blend(grey, p[c], factor);
    }
  }
}

// Blend of a smoothed image and the image; the outermost pixels stay.
void sharpness(const ImageView& in, float factor, uint8_t* out) {
  const int64_t bytes = 3 * in.width;
  for (int64_t y = 0; y < in.height; ++y, out += bytes) {
    const uint8_t* p = in.data + y * in.stride;
    std::memcpy(out, p, bytes);
    if (y == 0 || y + 1 == in.height) continue;
    const uint8_t *up = p - in.stride, *down = p + in.stride;
    for (int64_t i = 3; i + 3 < bytes; ++i) {
      const int sum = up[i - 3] + up[i] + up[i + 3] + p[i - 3] + 5 * p[i] + p[i + 3] + down[i - 3] +
                      down[i] + down[i + 3];
      out[i] = blend((2 * sum + 13) / 26, p[i], factor);
    }
  }
}

// Geometry: the output pixel whose centre is (x, y) shows the input at a * (x, y, 1).
void nearest(const ImageView& in, const double* a, uint8_t* out) {
  const auto fixed = [](double v) { return static_cast<int64_t>(std::floor(v * 65536.0 + 0.5)); };
  const uint8_t fill = static_cast<uint8_t>(a[6]);
  int64_t x0 = fixed(a[2] + a[0] * 0.5 + a[1] * 0.5), y0 = fixed(a[5] + a[3] * 0.5 + a[4] * 0.5);
  const int64_t ax = fixed(a[0]), bx = fixed(a[1]), ay = fixed(a[3]), by = fixed(a[4]);
  for (int64_t y = 0; y < in.height; ++y, x0 += bx, y0 += by) {
    int64_t u = x0, v = y0;
    for (int64_t x = 0; x < in.width; ++x, u += ax, v += ay, out += 3) {
      const int64_t i = u >> 16, j = v >> 16;
      if (i >= 0 && i < in.width && j >= 0 && j < in.height)
        std::memcpy(out, in.data + j * in.stride + 3 * i, 3);
      else
        std::memset(out, fill, 3);
    }
  }
}

void bilinear(const ImageView& in, const double* a, uint8_t* out) {
  const uint8_t fill = static_cast<uint8_t>(a[6]);
  const double width = static_cast<double>(in.width), height = static_cast<double>(in.height);
  for (int64_t y = 0; y < in.height; ++y)
    for (int64_t x = 0; x < in.width; ++x, out += 3) {
      const double px = static_cast<double>(x) + 0.5, py = static_cast<double>(y) + 0.5;
      const double u = a[0] * px + a[1] * py + a[2], v = a[3] * px + a[4] * py + a[5];
      if (!(u >= 0.0 && u < width && v >= 0.0 && v < height)) {
        std::memset(out, fill, 3);
        continue;
      }
      const double fu = std::floor(u - 0.5), fv = std::floor(v - 0.5);
      const double du = u - 0.5 - fu, dv = v - 0.5 - fv;
      const int64_t i = static_cast<int64_t>(fu), j = static_cast<int64_t>(fv);
      const int64_t left = std::max<int64_t>(i, 0), right = std::min(i + 1, in.width - 1);
      const uint8_t* above = in.data + std::max<int64_t>(j, 0) * in.stride;
      const uint8_t* below = in.data + std::min(j + 1, in.height - 1) * in.stride;
      for (int c = 0; c < 3; ++c) {
        const double l0 = above[3 * left + c], r0 = above[3 * right + c];
        const double l1 = below[3 * left + c], r1 = below[3 * right + c];
        const double top = l0 + (r0 - l0) * du, bottom = l1 + (r1 - l1) * du;
        out[c] = static_cast<uint8_t>(top + (bottom - top) * dv);
      }
    }
}

}  // namespace

ImageView augmented(ImageView image, const Operation* operations, int64_t count,
                    std::vector<uint8_t> (&images)[2]) {
  for (int64_t i = 0; i < count; ++i) {
    const Operation& op = operations[i];
    std::vector<uint8_t>& target = images[i & 1];
    target.resize(3 * image.width * image.height);
    uint8_t* out = target.data();
    std::array<Table, 3> tables;
    if (table_of(op, image, tables))
      look_up(image, tables, out);
    else if (op.kind == Augment::kColor)
      color(image, static_cast<float>(op.values[0]), out);
    else if (op.kind == Augment::kSharpness)
      sharpness(image, static_cast<float>(op.values[0]), out);
    else if (op.kind == Augment::kNearest)
      nearest(image, op.values, out);
    else
      bilinear(image, op.values, out);
    image = {out, 3 * image.width, image.width, image.height};
  }
  return image;
}

}  // namespace fastvlp
