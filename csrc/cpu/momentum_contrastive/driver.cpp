#include "driver.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "../core/scratch.h"

namespace fastvlp {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The memory of one partial result: sums at zero, own pairs not found, no negative.
class Partial {
 public:
  Partial(const MomentumProblem& p, int64_t width) {
    const int64_t rows = p.stacked_rows(), group = p.group_rows;
    const int64_t keys = p.gradients ? rows * width : 0;
    const int64_t positive_keys = p.gradients && p.ids != nullptr ? group * width : 0;
    const int64_t total = 3 * rows + 4 * group + keys + positive_keys;
    floats_ = allocate_floats(total);
    std::fill_n(floats_.get(), total, 0.0f);
    negatives_.assign(group, -1);
    float* at = floats_.get();
    auto take = [&](int64_t n) { return std::exchange(at, at + n); };
    view_.keys = take(keys);  // first, and so aligned
    view_.positive_keys = take(positive_keys);
    view_.reference = take(rows);
    view_.sum = take(rows);
    view_.own = take(rows);
    view_.cross = take(group);
    view_.positive = take(group);
    view_.positives = take(group);
    view_.best = take(group);
    view_.negative = negatives_.data();
    std::fill_n(view_.own, rows, kNaN);
    std::fill_n(view_.best, group, -kInfinity);
  }
  const MomentumPartial& view() const { return view_; }

 private:
  Buffer floats_;
  std::vector<int64_t> negatives_;
  MomentumPartial view_ = {};
};

using Parts = std::vector<const MomentumPartial*>;

template <class T>
double dot_and_store(const T* student, const double* gradient, int64_t n, T* out) {
  double product = 0.0;
  for (int64_t d = 0; d < n; ++d) {
    out[d] = static_cast<T>(static_cast<float>(gradient[d]));
    product += static_cast<double>(static_cast<float>(student[d])) * gradient[d];
  }
  return product;
}

// Stores one row of the gradient and returns its dot product with the student's row.
double store_gradient(const Features& student, int64_t row, const double* gradient, int64_t dim,
                      GradientOutput out) {
  return with_row(student, row, [&](const auto* in) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(in)>>;
    return dot_and_store(in, gradient, dim, static_cast<T*>(out.data) + row * dim);
  });
}

double element_at(const Features& m, int64_t row, int64_t d) {
  return with_row(m, row, [&](const auto* in) { return static_cast<float>(in[d]); });
}

// The softmax of one stacked row over all parts and its own pair.
struct Softmax {
  double own = 0.0;  // logit of its own pair
  double lse = 0.0;
  double share(double logit) const { return std::exp(logit - lse); }
};

double logit_of_own_pair(const Parts& parts, int64_t at) {
  for (const MomentumPartial* part : parts)
    if (!std::isnan(part->own[at])) return part->own[at];
  return kNaN;  // the logit itself is NaN
}

Softmax softmax_of(const Parts& parts, int64_t at) {
  Softmax s;
  s.own = logit_of_own_pair(parts, at);
  double highest = s.own;
  for (const MomentumPartial* part : parts)
    if (part->sum[at] != 0.0f) highest = std::max<double>(highest, part->reference[at]);
  double sum = std::exp(s.own - highest);
  for (const MomentumPartial* part : parts)
    if (part->sum[at] != 0.0f) sum += part->sum[at] * std::exp(part->reference[at] - highest);
  s.lse = highest + std::log(sum);
  return s;
}

// Adds factor * values to a row of doubles; nothing where the factor is 0, whatever the values.
void add_row(double factor, const float* values, int64_t n, double* row) {
  if (factor == 0.0) return;
  for (int64_t d = 0; d < n; ++d) row[d] += factor * values[d];
}

struct RowResult {
  double loss;
  double temperature_gradient;
};

// Finishes row i of a group: loss, gradient and its dot product with the student.
RowResult finish_row(const MomentumProblem& p, int64_t first_row, int64_t i, const Parts& parts,
                     int64_t width, double alpha, double share, std::vector<double>& gradient,
                     const MomentumOutput& out) {
  const int64_t teacher_row = i + p.group_rows;
  const Softmax student = softmax_of(parts, i);
  const Softmax teacher = p.use_teacher ? softmax_of(parts, teacher_row) : Softmax{};
  double positives = 1.0, positive_sum = student.own;
  double cross = p.use_teacher ? teacher.share(teacher.own) * student.own : 0.0;
  for (const MomentumPartial* part : parts) {
    positives += part->positives[i];
    positive_sum += part->positive[i];
    if (p.use_teacher && part->sum[teacher_row] != 0.0f)
      cross += part->cross[i] * teacher.share(part->reference[teacher_row]);
  }
  RowResult result = {student.lse, 0.0};
  if (p.use_teacher) result.loss -= alpha * cross;
  if (alpha != 1.0) result.loss -= (1.0 - alpha) * positive_sum / positives;
  if (!p.gradients) return result;

  const double hard = (1.0 - alpha) / positives;
  double own = student.share(student.own) - hard;
  if (p.use_teacher) own -= alpha * teacher.share(teacher.own);
  for (int64_t d = 0; d < p.dim; ++d)
    gradient[d] = own == 0.0 ? 0.0 : own * element_at(p.batch_keys, first_row + i, d);
  for (const MomentumPartial* part : parts) {
    if (part->sum[i] != 0.0f)
      add_row(student.share(part->reference[i]), part->keys + i * width, p.dim, gradient.data());
    if (p.use_teacher && part->sum[teacher_row] != 0.0f)
      add_row(-alpha * teacher.share(part->reference[teacher_row]),
              part->keys + teacher_row * width, p.dim, gradient.data());
    if (p.ids != nullptr && part->positives[i] > 0.0f)
      add_row(-hard, part->positive_keys + i * width, p.dim, gradient.data());
  }
  const double factor = share * p.inverse_temperature / static_cast<double>(p.batch);
  for (int64_t d = 0; d < p.dim; ++d) gradient[d] *= factor;
  // The loss sees student and temperature as student / temperature.
  result.temperature_gradient =
      -p.inverse_temperature *
      store_gradient(p.student, first_row + i, gradient.data(), p.dim, out.student);
  return result;
}

void finish_group(const MomentumProblem& p, int64_t group, const Parts& parts, int64_t width,
                  double alpha, double share, MomentumOutput& out, double* loss,
                  double* temperature_gradient) {
  std::vector<double> gradient(p.dim);
  const int64_t first_row = group * p.group_rows;
  for (int64_t i = 0; i < p.rows_in(group); ++i) {
    const RowResult row = finish_row(p, first_row, i, parts, width, alpha, share, gradient, out);
    *loss += row.loss;
    *temperature_gradient += row.temperature_gradient;
    if (out.negatives == nullptr) continue;
    float best = -kInfinity;
    out.negatives[first_row + i] = -1;
    for (const MomentumPartial* part : parts)
      if (part->best[i] > best) {
        best = part->best[i];
        out.negatives[first_row + i] = part->negative[i];
      }
  }
}

}  // namespace

void momentum_contrastive(const MomentumProblem (&problems)[2], const MomentumKernels& kernels,
                          const Parallel& parallel, int64_t threads, double alpha, double share,
                          MomentumOutput (&outputs)[2]) {
  const int64_t groups = problems[0].groups(), width = kernels.padded_dim(problems[0]);
  // As many slices of the keys as give every thread the same number of items.
  const int64_t blocks = std::min(problems[0].blocks(), problems[1].blocks());
  const int64_t slices =
      std::min<int64_t>(blocks, threads / std::gcd<int64_t>(threads, 2 * groups));
  const int64_t items = 2 * groups * slices;
  std::vector<Partial> partials;
  partials.reserve(items);
  for (int64_t item = 0; item < items; ++item)
    partials.emplace_back(problems[item / (groups * slices)], width);
  parallel(items, [&](int64_t begin, int64_t end) {
    Buffer scratch = allocate_floats(kernels.scratch_bytes(problems[0]) / 4);
    for (int64_t item = begin; item < end; ++item) {
      const MomentumProblem& p = problems[item / (groups * slices)];
      const int64_t slice = item % slices;
      kernels.accumulate(p, item / slices % groups, p.blocks() * slice / slices,
                         p.blocks() * (slice + 1) / slices, scratch.get(), partials[item].view());
    }
  });
  // By group, added in order afterwards: the sums do not depend on the schedule.
  std::vector<double> losses(2 * groups, 0.0), temperature_gradients(2 * groups, 0.0);
  parallel(2 * groups, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      Parts parts;
      for (int64_t slice = 0; slice < slices; ++slice)
        parts.push_back(&partials[g * slices + slice].view());
      finish_group(problems[g / groups], g % groups, parts, width, alpha, share,
                   outputs[g / groups], &losses[g], &temperature_gradients[g]);
    }
  });
  for (int64_t g = 0; g < 2 * groups; ++g) {
    MomentumOutput& out = outputs[g / groups];
    out.loss += losses[g] / static_cast<double>(problems[0].batch);
    out.temperature_gradient += temperature_gradients[g];
  }
}

}  // namespace fastvlp
