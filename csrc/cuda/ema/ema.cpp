// The multi-tensor operators on CUDA tensors: tables kept in device memory, the current stream.
#include "../core/host.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <optional>
#include <vector>

#include "../../common/ema_lists.h"
#include "../core/stream_copies.h"
#include "ema.h"

namespace fastvlp::cuda {
namespace {

using torch::headeronly::ScalarType;

// A table in device memory, and the point in its stream from which on it is there.
struct DeviceTable {
  Tensor bytes;
  TableView view;
  Event uploaded;
};
using Cache = TableCache<StreamCopies<DeviceTable>>;

// The table in memory of the current device, on the current stream: its memory is taken, filled,
// read and given back in the order of that stream. The copy goes from pinned memory, so that
// nothing waits for it; torch's pinned allocator keeps `host` until the copy has been made.
DeviceTable upload(const HostTable& table, const Tensor& like, Queue queue) {
  const size_t entries = table.entries.size() * sizeof(TableEntry);
  const size_t geometries = table.geometries.size() * sizeof(Geometry);
  const size_t chunks = table.chunk_entry.size() * sizeof(int32_t);
  const int64_t bytes = static_cast<int64_t>(entries + geometries + chunks);
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  Tensor host = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, cpu, true);
  char* at = static_cast<char*>(host.mutable_data_ptr());
  std::memcpy(at, table.entries.data(), entries);
  std::memcpy(at + entries, table.geometries.data(), geometries);
  std::memcpy(at + entries + geometries, table.chunk_entry.data(), chunks);
  DeviceTable out = {torch::stable::new_empty(like, {bytes}, ScalarType::Byte), table.view(), {}};
  torch::stable::copy_(out.bytes, host, true);
  require_success(out.uploaded.record(queue));
  const char* base = static_cast<const char*>(out.bytes.const_data_ptr());
  out.view.entries = reinterpret_cast<const TableEntry*>(base);
  out.view.geometries = reinterpret_cast<const Geometry*>(base + entries);
  out.view.chunk_entry = reinterpret_cast<const int32_t*>(base + entries + geometries);
  return out;
}

// For as long as the process runs.
void keep(std::shared_ptr<DeviceTable> table) {
  static auto& mutex = *new std::mutex;
  static auto& kept = *new std::vector<std::shared_ptr<DeviceTable>>;
  const std::lock_guard<std::mutex> hold(mutex);
  kept.push_back(std::move(table));
}

// The table of a call, in device memory for the stream that the call's work goes to.
//
// A captured graph reads its table each time it is replayed, on any stream: any copy that has
// arrived will do, and is kept for good. None is made, since memory taken during a capture belongs
// to the graph's pool and a copy queued then is made again at each replay.
std::shared_ptr<DeviceTable> table_of(const std::vector<TensorList>& given, Queue queue) {
  static auto& cache = *new Cache;
  auto item = cache.find_or_build(given, kEmaChunk);
  if (!is_capturing(queue))
    return item->extra.of(queue.stream,
                          [&] { return upload(item->table, given[0].tensors[0], queue); });
  auto found =
      item->extra.find([](void*, const DeviceTable& table) { return table.uploaded.query(); });
  STD_TORCH_CHECK(found != nullptr, given[0].name,
                  ": expected one call with the same tensors, and a wait for the device "
                  "(torch.cuda.synchronize()), before a graph is captured");
  keep(found);
  return found;
}

Decay decay_of(const std::optional<Tensor>& tensor, double value, const Tensor& like) {
  if (!tensor.has_value()) {
    STD_TORCH_CHECK(is_decay(value), "decay: expected a value between 0 and 1, got ", value);
    return {nullptr, false, value};
  }
  const bool wide = tensor->scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(tensor->is_cuda() && tensor->get_device_index() == like.get_device_index() &&
                      tensor->numel() == 1 && (wide || tensor->scalar_type() == ScalarType::Float),
                  "decay: expected one float32 or float64 value on the tensors' device");
  return {tensor->const_data_ptr(), wide, 0.0};
}

const int64_t* flag_of(const std::optional<Tensor>& nonfinite, const Tensor& like) {
  if (!nonfinite.has_value()) return nullptr;
  const bool on_device =
      nonfinite->is_cuda() && nonfinite->get_device_index() == like.get_device_index();
  STD_TORCH_CHECK(
      on_device && nonfinite->numel() == 1 && nonfinite->scalar_type() == ScalarType::Long,
      "nonfinite: expected one int64 value on the tensors' device");
  return static_cast<const int64_t*>(nonfinite->const_data_ptr());
}

// Operators have names of their own: a qualified name that the namespace itself declares, as ema.h
// does, is never looked up in its unnamed namespace.
void cuda_ema_update(const Tensors& momentum, const Tensors& source, const Tensors& copies,
                     const std::optional<Tensor>& decay_tensor, double decay,
                     const std::optional<Tensor>& nonfinite) {
  const Tensor& like = momentum.at(0);
  const DeviceScope scope(like);
  const Queue queue = scope.queue();
  const auto table = table_of(ema_lists(momentum, source, copies), queue);
  require_success(ema_update(queue, table->view, decay_of(decay_tensor, decay, like),
                             flag_of(nonfinite, like)));
}

void cuda_adamw_ema(const Tensors& weights, const Tensors& gradients, const Tensors& first,
                    const Tensors& second, const Tensors& momentum, const Tensors& weight_copies,
                    const Tensors& momentum_copies, double lr, double beta1, double beta2,
                    double eps, double weight_decay, double step, bool maximize,
                    const std::optional<Tensor>& decay_tensor, double decay,
                    const std::optional<Tensor>& nonfinite) {
  const Tensor& like = weights.at(0);
  const DeviceScope scope(like);
  const Queue queue = scope.queue();
  const auto table = table_of(
      adamw_lists(weights, gradients, first, second, momentum, weight_copies, momentum_copies),
      queue);
  const AdamWFactors factors = adamw_factors(lr, beta1, beta2, eps, weight_decay, step, maximize);
  require_success(adamw_ema(queue, table->view, factors, decay_of(decay_tensor, decay, like),
                            flag_of(nonfinite, like)));
}

Tensor cuda_last_exceeding(const Tensors& tensors, double limit) {
  const Tensor& like = tensors.at(0);
  const DeviceScope scope(like);
  const Queue queue = scope.queue();
  const auto table = table_of(read_list(tensors), queue);
  Tensor found = torch::stable::new_empty(like, {}, ScalarType::Long);
  require_success(last_exceeding(queue, table->view, static_cast<float>(limit),
                                 static_cast<int64_t*>(found.mutable_data_ptr())));
  return found;
}

}  // namespace
}  // namespace fastvlp::cuda

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CUDA, m) {
  m.impl("ema_update", TORCH_BOX(&fastvlp::cuda::cuda_ema_update));
  m.impl("adamw_ema", TORCH_BOX(&fastvlp::cuda::cuda_adamw_ema));
  m.impl("last_exceeding", TORCH_BOX(&fastvlp::cuda::cuda_last_exceeding));
}
