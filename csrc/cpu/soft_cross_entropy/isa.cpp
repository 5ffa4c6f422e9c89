// The passes of soft cross entropy for one instruction set. Compiled once per set with FASTVLP_ISA
// naming it; everything but the one exported table has internal linkage.
//
// A row is walked in blocks of the vocabulary. Exponentials are taken relative to the block's own
// maximum while the block is in L1 and wait in scratch until the row's sum is
// known; then one multiplication a block makes them probabilities.
#include "kernel.h"

#include <algorithm>
#include <cmath>

#include "../core/isa_name.h"
#include "../core/nontemporal_store.h"
#include "../core/simd.h"

namespace {

using fastvlp::Element;
using fastvlp::Logits;
using fastvlp::SoftCrossEntropyRows;
using fastvlp::WeightGradient;

constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");
constexpr int64_t kBlock = 1024;

typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));

struct Float32 {
  using type = float;
  static Vec load(const float* p) { return ::load(p); }
  static void store(float* p, Vec v) { ::store(p, v); }
  static float get(const float* p) { return *p; }
  static void set(float* p, float v) { *p = v; }
};

struct BFloat16 {
  using type = uint16_t;
  static Vec load(const uint16_t* p) {
    Half h;
    std::memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, VecU) << 16);
  }
  // To the nearest, ties to even; a NaN could round to infinity and is set by hand.
  static void store(uint16_t* p, Vec v) {
    const VecU b = (VecU)v;
    const VecU rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    const Half h = __builtin_convertvector(v == v ? rounded : VecU{} + 0x7fc0u, Half);
    std::memcpy(p, &h, sizeof h);
  }
  static float get(const uint16_t* p) {
    const uint32_t b = static_cast<uint32_t>(*p) << 16;
    float f;
    std::memcpy(&f, &b, 4);
    return f;
  }
  static void set(uint16_t* p, float v) {
    uint16_t all[kLanes];
    store(all, splat(v));
    *p = all[0];
  }
};

int64_t blocks_of(int64_t cols) { return (cols + kBlock - 1) / kBlock; }

// One block's softmax: values are exp(z - shift), where shift is the maximum (0 where that is
// -infinity, so that exponentials of an impossible block are 0).
struct Softmax {
  float shift;
  float sum;
};

// Scratch of one row, in floats.
struct Scratch {
  Scratch(float* base, int64_t cols) {
    const int64_t blocks = blocks_of(cols);
    student = base;
    teacher = student + blocks * kBlock;
    student_blocks = reinterpret_cast<Softmax*>(teacher + blocks * kBlock);
    teacher_blocks = student_blocks + blocks;
    dots = reinterpret_cast<float*>(teacher_blocks + blocks);
  }
  static int64_t floats(int64_t cols) { return blocks_of(cols) * (2 * kBlock + 5); }
  float *student, *teacher;
  Softmax *student_blocks, *teacher_blocks;
  float* dots;  // of a block: sum of exp(z' - shift') * (z - shift)
};

// Logits of a block with their bias as floats, filled up to whole vectors with -infinity. Returns
// the shift. `n` is the number of columns in the block.
template <class T>
float widen(const Logits& m, int64_t row, int64_t first, int64_t n, float* out) {
  const auto* in = static_cast<const typename T::type*>(m.data) + row * m.stride + first;
  Vec most = splat(-kInfinity);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    Vec v = T::load(in + j);
    if (m.bias) v = v + load(m.bias + first + j);
    store(out + j, v);
    most = max(v, most);
  }
  for (int64_t k = j; k < n; ++k) out[k] = T::get(in + k) + (m.bias ? m.bias[first + k] : 0.0f);
  if (j < n) {
    for (int64_t k = n; k < j + kLanes; ++k) out[k] = -kInfinity;
    most = max(load(out + j), most);
  }
  const float largest = horizontal_max(most);
  return largest == -kInfinity ? 0.0f : largest;
}

float widen(const Logits& m, int64_t row, int64_t first, int64_t n, float* out) {
  return m.element == Element::kFloat32 ? widen<Float32>(m, row, first, n, out)
                                        : widen<BFloat16>(m, row, first, n, out);
}

float exponentials(float* z, int64_t n, float shift) {
  Vec sum = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vec e = exp(load(z + j) - shift);
    store(z + j, e);
    sum = sum + e;
  }
  return horizontal_sum(sum);
}

// Both softmaxes of a block and the teacher's mean of the student's logits.
void exponentials(float* z, float* t, int64_t n, Softmax* student, Softmax* teacher, float* dot) {
  Vec sum = {}, teacher_sum = {}, product = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vec x = load(z + j) - student->shift;
    const Vec e = exp(x), p = exp(load(t + j) - teacher->shift);
    store(z + j, e);
    store(t + j, p);
    sum = sum + e;
    teacher_sum = teacher_sum + p;
    // A token that the teacher rules out may be impossible for the student: 0 * -infinity is 0.
    product = product + (p == 0.0f ? Vec{} : p * x);
  }
  student->sum = horizontal_sum(sum);
  teacher->sum = horizontal_sum(teacher_sum);
  *dot = horizontal_sum(product);
}

// The blocks as one: sum is relative to max, and a NaN of any block is in the sum.
struct Merged {
  float max = -kInfinity;
  double sum = 0.0;
};

Merged merge(const Softmax* blocks, int64_t count) {
  Merged all;
  for (int64_t b = 0; b < count; ++b)
    if (blocks[b].sum != 0.0f) all.max = std::max(all.max, blocks[b].shift);
  for (int64_t b = 0; b < count; ++b)
    if (blocks[b].sum != 0.0f)
      all.sum += blocks[b].sum * std::exp(static_cast<double>(blocks[b].shift) - all.max);
  return all;
}

// What turns a block's exponentials into probabilities. A block that is all 0 stays so, however far
// its arbitrary shift lies above the maximum.
float to_probability(const Softmax& block, const Merged& all) {
  if (block.sum == 0.0f) return 0.0f;
  return static_cast<float>(std::exp(static_cast<double>(block.shift) - all.max) / all.sum);
}

template <class T>
void fill(typename T::type* out, int64_t n, float value) {
  for (int64_t j = 0; j < n; ++j) T::set(out + j, value);
}

template <class T>
class Row {
 public:
  Row(const SoftCrossEntropyRows& p, int64_t row, const Scratch& s) : p_(p), row_(row), s_(s) {}

  void run() {
    const int64_t label = p_.labels[row_];
    const bool inside = label >= 0 && label < p_.cols;
    if (label == p_.ignore_index || !inside) {
      const float value = label == p_.ignore_index ? 0.0f : kNan;
      p_.losses[row_] = value;
      if (p_.gradient) fill<T>(gradient(), p_.cols, value);
      return;
    }
    float positive = T::get(static_cast<const typename T::type*>(p_.student.data) +
                            row_ * p_.student.stride + label);
    if (p_.student.bias) positive += p_.student.bias[label];
    softmaxes();
    p_.losses[row_] = loss(positive);
    if (p_.gradient) write_gradient(label);
  }

 private:
  typename T::type* gradient() const {
    return static_cast<typename T::type*>(p_.gradient) + row_ * p_.gradient_stride;
  }
  int64_t blocks() const { return blocks_of(p_.cols); }
  int64_t cols_in(int64_t b) const { return std::min(kBlock, p_.cols - b * kBlock); }
  bool has_teacher() const { return p_.teacher.data != nullptr; }

  void softmaxes() {
    for (int64_t b = 0; b < blocks(); ++b) {
      const int64_t first = b * kBlock, n = cols_in(b);
      float *z = s_.student + first, *t = s_.teacher + first;
      Softmax* student = s_.student_blocks + b;
      Softmax* teacher = s_.teacher_blocks + b;
      student->shift = widen(p_.student, row_, first, n, z);
      if (!has_teacher()) {
        student->sum = exponentials(z, n, student->shift);
        continue;
      }
      teacher->shift = widen(p_.teacher, row_, first, n, t);
      exponentials(z, t, n, student, teacher, s_.dots + b);
    }
    all_ = merge(s_.student_blocks, blocks());
    if (has_teacher()) teacher_all_ = merge(s_.teacher_blocks, blocks());
  }

  // log sum_j e^z_j - (1 - alpha) z_label - alpha sum_j p'_j z_j, every z relative to the maximum.
  float loss(float positive) const {
    double value = std::log(all_.sum);
    const double hard = has_teacher() ? 1.0 - p_.alpha : 1.0;
    value += hard * (static_cast<double>(all_.max) - positive);
    if (!has_teacher()) return static_cast<float>(value);
    double mean = 0.0;
    for (int64_t b = 0; b < blocks(); ++b) {
      const Softmax &student = s_.student_blocks[b], &teacher = s_.teacher_blocks[b];
      if (teacher.sum == 0.0f) continue;
      const double offset = static_cast<double>(student.shift) - all_.max;
      mean += std::exp(static_cast<double>(teacher.shift) - teacher_all_.max) *
              (s_.dots[b] + teacher.sum * offset);
    }
    return static_cast<float>(value - p_.alpha * mean / teacher_all_.sum);
  }

  void write_gradient(int64_t label) const {
    for (int64_t b = 0; b < blocks(); ++b) {
      const float own = to_probability(s_.student_blocks[b], all_);
      if (has_teacher())
        write_block<true>(b, own, p_.alpha * to_probability(s_.teacher_blocks[b], teacher_all_));
      else
        write_block<false>(b, own, 0.0f);
    }
    // From the unrounded value: the label's gradient is a small difference where the row is learnt.
    const int64_t b = label / kBlock;
    float g = s_.student[label] * to_probability(s_.student_blocks[b], all_);
    if (has_teacher())
      g -= s_.teacher[label] * (p_.alpha * to_probability(s_.teacher_blocks[b], teacher_all_));
    T::set(gradient() + label, g - (has_teacher() ? 1.0f - p_.alpha : 1.0f));
  }

  template <bool soft>
  void write_block(int64_t b, float own, float others) const {
    const float *e = s_.student + b * kBlock, *t = s_.teacher + b * kBlock;
    auto* out = gradient() + b * kBlock;
    auto at = [&](int64_t j) {
      Vec g = load(e + j) * own;
      if constexpr (soft) g = g - load(t + j) * others;
      return g;
    };
    const int64_t n = cols_in(b), whole = n - n % kLanes;
    for (int64_t j = 0; j < whole; j += kLanes) T::store(out + j, at(j));
    if (whole == n) return;
    float rest[kLanes];
    store(rest, at(whole));
    for (int64_t j = whole; j < n; ++j) T::set(out + j, rest[j - whole]);
  }

  const SoftCrossEntropyRows& p_;
  int64_t row_;
  const Scratch& s_;
  Merged all_, teacher_all_;
};

int64_t scratch_floats(const SoftCrossEntropyRows& p) { return Scratch::floats(p.cols); }

template <class T>
void rows_of(const SoftCrossEntropyRows& p, int64_t begin, int64_t end, float* scratch) {
  const Scratch s(scratch, p.cols);
  for (int64_t i = begin; i < end; ++i) Row<T>(p, i, s).run();
}

void rows(const SoftCrossEntropyRows& p, int64_t begin, int64_t end, float* scratch) {
  if (p.student.element == Element::kFloat32)
    rows_of<Float32>(p, begin, end, scratch);
  else
    rows_of<BFloat16>(p, begin, end, scratch);
}

// Sums of 32 rows go to the total one after another: fewer roundings than one running sum.
template <class T>
void column_sums_of(const Logits& m, int64_t rows, const float* weights, int64_t begin, int64_t end,
                    float* sums) {
  constexpr int64_t kWidth = 8 * kLanes, kRows = 32;
  for (int64_t first = begin; first < end; first += kWidth) {
    const int64_t n = std::min(kWidth, end - first), whole = n - n % kLanes;
    float total[kWidth] = {};
    for (int64_t top = 0; top < rows; top += kRows) {
      float part[kWidth] = {};
      for (int64_t i = top; i < std::min(rows, top + kRows); ++i) {
        const auto* in = static_cast<const typename T::type*>(m.data) + i * m.stride + first;
        for (int64_t j = 0; j < whole; j += kLanes)
          store(part + j, load(part + j) + T::load(in + j) * weights[i]);
        for (int64_t j = whole; j < n; ++j) part[j] += T::get(in + j) * weights[i];
      }
      for (int64_t j = 0; j < kWidth; j += kLanes)
        store(total + j, load(total + j) + load(part + j));
    }
    std::memcpy(sums + first, total, n * 4);
  }
}

void column_sums(const Logits& m, int64_t rows, const float* weights, int64_t begin, int64_t end,
                 float* sums) {
  if (m.element == Element::kFloat32)
    column_sums_of<Float32>(m, rows, weights, begin, end, sums);
  else
    column_sums_of<BFloat16>(m, rows, weights, begin, end, sums);
}

// Two rows of the vocabulary at a time, which share the loads of the hidden states.
template <class T>
void weight_gradient_pair(const WeightGradient& p, int64_t first, int64_t count, float* out) {
  constexpr int kVectors = 4;
  static_assert(fastvlp::kHiddenGrain % (kVectors * kLanes) == 0);
  float weights[fastvlp::kFewRows][2];
  for (int64_t i = 0; i < p.rows; ++i) {
    const auto* in = static_cast<const typename T::type*>(p.gradient.data) + i * p.gradient.stride;
    weights[i][0] = T::get(in + first);
    weights[i][1] = count > 1 ? T::get(in + first + 1) : 0.0f;
  }
  for (int64_t d = 0; d < p.stride; d += kVectors * kLanes) {
    Vec sums[2][kVectors] = {};
    for (int64_t i = 0; i < p.rows; ++i)
      for (int k = 0; k < kVectors; ++k) {
        const Vec hidden = load(p.hidden + i * p.stride + d + k * kLanes);
        for (int r = 0; r < 2; ++r) sums[r][k] = sums[r][k] + hidden * weights[i][r];
      }
    for (int r = 0; r < 2; ++r)
      for (int k = 0; k < kVectors; ++k)
        store(out + r * p.stride + d + k * kLanes, sums[r][k] * p.factor);
  }
}

void weight_gradient(const WeightGradient& p, int64_t begin, int64_t end, float* scratch) {
  const bool is_float = p.gradient.element == Element::kFloat32;
  auto* pair = is_float ? weight_gradient_pair<Float32> : weight_gradient_pair<BFloat16>;
  const int64_t row_bytes = p.width * bytes_of(p.element);
  for (int64_t v = begin; v < end; v += 2) {
    const int64_t count = std::min<int64_t>(2, end - v);
    pair(p, v, count, scratch);
    for (int64_t r = 0; r < count; ++r) {
      const float* found = scratch + r * p.stride;
      char* out = static_cast<char*>(p.out) + (v + r) * row_bytes;
      if (p.is_large && p.element == Element::kFloat32)
        stream_bytes(out, found, row_bytes);
      else
        from_floats(found, p.width, p.element, out);
    }
  }
  finish_streams();
}

}  // namespace

namespace fastvlp {

const SoftCrossEntropyKernels& FASTVLP_JOIN(soft_cross_entropy_kernels_, FASTVLP_ISA)() {
  static constexpr SoftCrossEntropyKernels table = {scratch_floats, rows, column_sums,
                                                    weight_gradient};
  return table;
}

}  // namespace fastvlp
