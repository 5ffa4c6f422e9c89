// The passes of soft cross entropy on CPU tensors: argument checks, threads, instruction set.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../core/driver.h"
#include "../core/isa.h"
#include "../core/outputs.h"
#include "../core/scratch.h"
#include "../core/tensor_args.h"
#include "kernel.h"

namespace fastvlp {

FASTVLP_DEFINE_KERNELS(SoftCrossEntropyKernels, soft_cross_entropy)

namespace {

Logits logits_of(const Tensor& t, const Tensor& bias, const char* name) {
  const bool is_float = t.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(is_float || t.scalar_type() == ScalarType::BFloat16, name,
                  ": expected float32 or bfloat16");
  STD_TORCH_CHECK(t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1), name,
                  ": expected 2 dimensions with unit stride along dim 1");
  return {t.const_data_ptr(), is_float ? Element::kFloat32 : Element::kBFloat16, t.stride(0),
          bias.numel() == 0 ? nullptr : floats_of(bias, t.size(1), "bias")};
}

void rows(const Tensor& logits, const Tensor& bias, const Tensor& teacher,
          const Tensor& teacher_bias, const Tensor& labels, const Tensor& alpha,
          int64_t ignore_index, Tensor losses, Tensor gradient) {
  SoftCrossEntropyRows p = {};
  const int64_t count = logits.size(0);
  p.student = logits_of(logits, bias, "logits");
  p.cols = logits.size(1);
  if (teacher.numel() > 0) {
    p.teacher = logits_of(teacher, teacher_bias, "teacher");
    STD_TORCH_CHECK(teacher.size(0) == count && teacher.size(1) == p.cols,
                    "teacher: expected the shape of logits");
  }
  p.labels = int64s_of(labels, count, "labels");
  p.ignore_index = ignore_index;
  p.alpha = *floats_of(alpha, 1, "alpha");
  floats_of(losses, count, "losses");
  p.losses = mutable_floats_of(losses);
  if (gradient.numel() > 0) {
    const Logits out = logits_of(gradient, bias, "gradient");
    STD_TORCH_CHECK(
        out.element == p.student.element && gradient.size(0) == count && gradient.size(1) == p.cols,
        "gradient: expected the shape and dtype of logits");
    p.gradient = gradient.mutable_data_ptr();
    p.gradient_stride = out.stride;
  }
  const SoftCrossEntropyKernels& kernels = soft_cross_entropy_kernels();
  run_parallel(count, [&](int64_t begin, int64_t end) {
    const Buffer scratch = allocate_floats(kernels.scratch_floats(p));
    kernels.rows(p, begin, end, scratch.get());
  });
}

Tensor column_sums(const Tensor& matrix, const Tensor& weights) {
  const Tensor none = empty_tensor({0}, aoti_torch_dtype_float32());
  const Logits m = logits_of(matrix, none, "matrix");
  const float* w = floats_of(weights, matrix.size(0), "weights");
  Tensor sums = empty_tensor({matrix.size(1)}, aoti_torch_dtype_float32());
  float* out = mutable_floats_of(sums);
  const SoftCrossEntropyKernels& kernels = soft_cross_entropy_kernels();
  const int64_t count = matrix.size(0), cols = matrix.size(1), width = 512;
  run_parallel((cols + width - 1) / width, [&](int64_t begin, int64_t end) {
    const int64_t last = end * width < cols ? end * width : cols;
    kernels.column_sums(m, count, w, begin * width, last, out);
  });
  return sums;
}

// The rows as floats, of `stride` each, zeros past the width.
Buffer hidden_of(const Features& rows, int64_t width, int64_t stride) {
  Buffer out = allocate_floats(rows.rows * stride);
  for (int64_t i = 0; i < rows.rows; ++i) {
    float* to = out.get() + i * stride;
    std::fill_n(to + width, stride - width, 0.0f);
    with_row(rows, i, [&](const auto* from) {
      for (int64_t d = 0; d < width; ++d) to[d] = static_cast<float>(from[d]);
    });
  }
  return out;
}

Tensor weight_gradient(const Tensor& gradient, const Tensor& hidden, const Tensor& like,
                       double factor) {
  constexpr int64_t kTaskRows = 256;
  constexpr int64_t kCacheBytes = int64_t{4} << 20;
  const Tensor none = empty_tensor({0}, aoti_torch_dtype_float32());
  WeightGradient p = {};
  p.gradient = logits_of(gradient, none, "gradient");
  p.rows = gradient.size(0);
  const int64_t vocabulary = gradient.size(1);
  const Features rows = features_of(hidden, "hidden");
  STD_TORCH_CHECK(p.rows <= kFewRows && rows.rows == p.rows,
                  "gradient and hidden: expected the same number of rows, at most ", kFewRows);
  p.width = hidden.size(1);
  p.stride = (p.width + kHiddenGrain - 1) / kHiddenGrain * kHiddenGrain;
  const Buffer floats = hidden_of(rows, p.width, p.stride);
  p.hidden = floats.get();
  p.factor = static_cast<float>(factor);
  p.element = element_of(like, "like");
  Tensor out = empty_output(like, {vocabulary, p.width});
  p.out = out.mutable_data_ptr();
  p.is_large = vocabulary * p.width * bytes_of(p.element) > kCacheBytes;
  const SoftCrossEntropyKernels& kernels = soft_cross_entropy_kernels();
  run_parallel((vocabulary + kTaskRows - 1) / kTaskRows, [&](int64_t begin, int64_t end) {
    const Buffer scratch = allocate_floats(2 * p.stride);
    kernels.weight_gradient(p, begin * kTaskRows, std::min(vocabulary, end * kTaskRows),
                            scratch.get());
  });
  return out;
}

std::string instruction_set() { return name_of(chosen_isa()); }

}  // namespace
}  // namespace fastvlp

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CPU, m) {
  m.impl("soft_cross_entropy_rows", TORCH_BOX(&fastvlp::rows));
  m.impl("soft_cross_entropy_column_sums", TORCH_BOX(&fastvlp::column_sums));
  m.impl("soft_cross_entropy_weight_gradient", TORCH_BOX(&fastvlp::weight_gradient));
}

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&fastvlp::instruction_set));
}
