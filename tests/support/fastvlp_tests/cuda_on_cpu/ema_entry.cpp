// The functions of csrc/cuda/ema/ema.h on lists of CPU tensors; follows ema.cu in one translation
// unit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../../common/ema_lists.h"

namespace {

using namespace fastvlp;

// Small chunks, so that tensors of a test have several.
HostTable table_of(const std::vector<TensorList>& given) { return lists::build(given, 1024); }

cuda::Decay decay_of(const std::optional<Tensor>& t, double value) {
  if (!t.has_value()) return {nullptr, false, value};
  return {t->const_data_ptr(), t->scalar_type() == torch::headeronly::ScalarType::Double, 0.0};
}

const int64_t* flag_of(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const int64_t*>(t->const_data_ptr()) : nullptr;
}

void require(const char* error) { STD_TORCH_CHECK(error == nullptr, error); }

void ema_update(const Tensors& momentum, const Tensors& source, const Tensors& copies,
                const std::optional<Tensor>& decay_tensor, double decay,
                const std::optional<Tensor>& nonfinite) {
  const HostTable table = table_of(ema_lists(momentum, source, copies));
  require(cuda::ema_update({}, table.view(), decay_of(decay_tensor, decay), flag_of(nonfinite)));
}

void adamw_ema(const Tensors& weights, const Tensors& gradients, const Tensors& first,
               const Tensors& second, const Tensors& momentum, const Tensors& weight_copies,
               const Tensors& momentum_copies, double lr, double beta1, double beta2, double eps,
               double weight_decay, double step, bool maximize,
               const std::optional<Tensor>& decay_tensor, double decay,
               const std::optional<Tensor>& nonfinite) {
  const HostTable table = table_of(adamw_lists(weights, gradients, first, second, momentum,
                                               weight_copies, momentum_copies));
  require(cuda::adamw_ema({}, table.view(),
                          adamw_factors(lr, beta1, beta2, eps, weight_decay, step, maximize),
                          decay_of(decay_tensor, decay), flag_of(nonfinite)));
}

Tensor last_exceeding(const Tensors& tensors, double limit) {
  const HostTable table = table_of(read_list(tensors));
  Tensor found = torch::stable::new_empty(tensors.at(0), {}, torch::headeronly::ScalarType::Long);
  require(cuda::last_exceeding({}, table.view(), static_cast<float>(limit),
                               static_cast<int64_t*>(found.mutable_data_ptr())));
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY(fastvlp_emulated, m) {
  m.def(
      "ema_update(Tensor(a!)[] momentum, Tensor[] source, Tensor(b!)[] copies, "
      "Tensor? decay_tensor, float decay, Tensor? nonfinite) -> ()");
  m.def(
      "adamw_ema(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] first_moments, "
      "Tensor(c!)[] second_moments, Tensor(d!)[] momentum, Tensor(e!)[] weight_copies, "
      "Tensor(f!)[] momentum_copies, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, float step, bool maximize, Tensor? decay_tensor, float decay, "
      "Tensor? nonfinite) -> ()");
  m.def("last_exceeding(Tensor[] tensors, float limit) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastvlp_emulated, CPU, m) {
  m.impl("ema_update", TORCH_BOX(&ema_update));
  m.impl("adamw_ema", TORCH_BOX(&adamw_ema));
  m.impl("last_exceeding", TORCH_BOX(&last_exceeding));
}
