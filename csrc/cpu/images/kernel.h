// What is done to one image of three 8-bit channels on its way into a batch, in terms that the
// files compiled once per instruction set and the operator share.
#pragma once

#include <cstdint>
#include <vector>

namespace fastvlp {

// Rows of interleaved RGB.
struct ImageView {
  const uint8_t* data;
  int64_t stride;  // bytes from row to row
  int64_t width, height;
};

struct Box {
  int64_t left, top, width, height;
};

// The kinds of operation; the numbers are part of the operator's interface.
enum class Augment : int64_t {
  kAutoContrast,
  kEqualize,
  kPosterize,
  kSolarize,
  kSolarizeAdd,
  kColor,
  kContrast,
  kBrightness,
  kSharpness,
  kNearest,
  kBilinear,
  kCount
};

struct Operation {
  Augment kind;
  const double* values;  // six, then the fill of the two geometric ones
};

struct ImagePlan {
  Box crop;
  int64_t width, height;  // the crop's size once resized
  Box window;             // the part of the resized crop that is kept
  bool flip;
  bool may_start_down;  // resize as Pillows do that begin with the vertical pass at times
  const Operation *before, *after;  // on the whole image; on the window, after the flip
  int64_t before_count, after_count;
};

// One image's place in the batch: three planes of floats, width x height each.
struct Plane {
  float* data;
  int64_t width, height;
};

// Memory that a thread keeps from image to image.
struct ImageScratch {
  std::vector<uint8_t> images[2], columns, row, kept;
  std::vector<int32_t> weights[2];
  std::vector<int64_t> firsts[2];
};

struct ImagesKernels {
  // table: the float of each channel's each value, [3, 256].
  void (*transform)(const ImageView& image, const ImagePlan& plan, const float* table,
                    const Plane& out, ImageScratch& scratch);
};

// Applies operations one after another, each as Pillow does it, from `image` to the scratch images;
// returns the last result. Baseline code: little of it gains from wider vectors.
ImageView augmented(ImageView image, const Operation* operations, int64_t count,
                    std::vector<uint8_t> (&images)[2]);

}  // namespace fastvlp
