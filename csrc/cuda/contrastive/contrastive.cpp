// The CUDA passes of the contrastive losses as operators: argument checks, scratch memory, the
// current stream.
#include "../core/host.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "../../common/tensor_element.h"
#include "contrastive.h"

namespace fastvlp::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool starts_vectors(const void* data, int64_t stride, int64_t element_bytes) {
  return stride % 4 == 0 && reinterpret_cast<uintptr_t>(data) % (4 * element_bytes) == 0;
}

void require_matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor");
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected 2 dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, ": expected unit stride along dim 1");
}

Similarities similarities_of(const Tensor& t, int64_t offset) {
  require_matrix(t, "similarities");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "similarities: expected float32");
  const float* data = static_cast<const float*>(t.const_data_ptr());
  return {data,        t.size(0), t.size(1),
          t.stride(0), offset,    starts_vectors(data, t.stride(0), sizeof(float))};
}

// `count` contiguous values of `type` on the device of `like`; null where there are none.
void* values_of(const Tensor& t, const char* name, int64_t count, ScalarType type,
                const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name,
                  ": expected the device of the similarities");
  STD_TORCH_CHECK(t.numel() == count && t.scalar_type() == type && t.is_contiguous(), name,
                  ": expected ", count, " contiguous values of ",
                  type == ScalarType::Double ? "float64" : "float32", ", got ", t.numel());
  return count > 0 ? t.mutable_data_ptr() : nullptr;
}

float* floats_of(const Tensor& t, const char* name, int64_t count, const Tensor& like) {
  return static_cast<float*>(values_of(t, name, count, ScalarType::Float, like));
}

float* floats_or_none(const Tensor& t, const char* name, int64_t count, const Tensor& like) {
  return t.numel() == 0 ? nullptr : floats_of(t, name, count, like);
}

double* doubles_or_none(const Tensor& t, const char* name, int64_t count, const Tensor& like) {
  if (t.numel() == 0) return nullptr;
  return static_cast<double*>(values_of(t, name, count, ScalarType::Double, like));
}

Output output_of(const Tensor& t, const Tensor& similarities) {
  if (t.numel() == 0) return {nullptr, 0, Element::kFloat32, false};
  require_matrix(t, "out");
  STD_TORCH_CHECK(t.size(0) == similarities.size(0) && t.size(1) == similarities.size(1),
                  "out: expected the shape of the similarities");
  STD_TORCH_CHECK(t.get_device_index() == similarities.get_device_index(),
                  "out: expected the device of the similarities");
  Output out = {t.mutable_data_ptr(), t.stride(0), element_of(t, "out"), false};
  out.vectorized = starts_vectors(out.data, out.stride, bytes_of(out.element));
  return out;
}

LsePair* pairs_of(const Tensor& scratch) {
  static_assert(sizeof(LsePair) == 2 * sizeof(float));
  return static_cast<LsePair*>(scratch.mutable_data_ptr());
}

void contrastive_cuda_statistics(const Tensor& similarities, const Tensor& scale, int64_t offset,
                                 const Tensor& row_negatives, const Tensor& positive,
                                 const Tensor& col_pairs) {
  const Similarities p = similarities_of(similarities, offset);
  const DeviceScope scope(similarities);
  float* pairs = floats_or_none(col_pairs, "col_pairs", 2 * p.cols, similarities);
  const Statistics out = {doubles_or_none(row_negatives, "row_negatives", p.rows, similarities),
                          floats_of(positive, "positive", p.rows, similarities), pairs,
                          pairs ? pairs + p.cols : nullptr};
  auto scratch = [&](bool wanted, int64_t count) {
    return torch::stable::new_empty(similarities, {wanted ? count : 0, 2}, ScalarType::Float);
  };
  const Tensor row_scratch = scratch(out.row_negatives != nullptr, row_pair_count(p));
  const Tensor col_scratch = scratch(pairs != nullptr, col_pair_count(p));
  require_success(statistics(scope.queue(), p, floats_of(scale, "scale", 1, similarities),
                             pairs_of(row_scratch), pairs_of(col_scratch), out));
}

void contrastive_cuda_gradient(const Tensor& similarities, const Tensor& scale,
                               const Tensor& row_lse, const Tensor& col_lse,
                               const Tensor& positive_gradient, const Tensor& weights,
                               int64_t offset, const Tensor& out) {
  const Similarities p = similarities_of(similarities, offset);
  const DeviceScope scope(similarities);
  require_success(softmax_gradient(
      scope.queue(), p, floats_of(scale, "scale", 1, similarities),
      doubles_or_none(row_lse, "row_lse", p.rows, similarities),
      doubles_or_none(col_lse, "col_lse", p.cols, similarities),
      floats_of(positive_gradient, "positive_gradient", p.rows, similarities),
      floats_of(weights, "weights", 2, similarities), output_of(out, similarities)));
}

void contrastive_cuda_sigmoid(const Tensor& similarities, const Tensor& scale, const Tensor& bias,
                              double factor, int64_t offset, const Tensor& sums,
                              const Tensor& out) {
  const Similarities p = similarities_of(similarities, offset);
  const DeviceScope scope(similarities);
  const Tensor partials =
      torch::stable::new_empty(similarities, {sigmoid_partial_count(p)}, ScalarType::Double);
  double* totals =
      static_cast<double*>(values_of(sums, "sums", 2, ScalarType::Double, similarities));
  require_success(sigmoid(scope.queue(), p, floats_of(scale, "scale", 1, similarities),
                          floats_of(bias, "bias", 1, similarities), static_cast<float>(factor),
                          static_cast<double*>(partials.mutable_data_ptr()), totals,
                          output_of(out, similarities)));
}

std::string cuda_kernels_unavailable(int64_t index) {
  const int device = static_cast<int>(index);
  const char* reason = device_error(device);
  if (reason == nullptr) {
    const DeviceScope scope(device);
    reason = kernel_error(device);
  }
  return reason == nullptr ? "" : reason;
}

}  // namespace
}  // namespace fastvlp::cuda

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CUDA, m) {
  m.impl("contrastive_cuda_statistics", TORCH_BOX(&fastvlp::cuda::contrastive_cuda_statistics));
  m.impl("contrastive_cuda_gradient", TORCH_BOX(&fastvlp::cuda::contrastive_cuda_gradient));
  m.impl("contrastive_cuda_sigmoid", TORCH_BOX(&fastvlp::cuda::contrastive_cuda_sigmoid));
}

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CompositeExplicitAutograd, m) {
  m.impl("cuda_kernels_unavailable", TORCH_BOX(&fastvlp::cuda::cuda_kernels_unavailable));
}
