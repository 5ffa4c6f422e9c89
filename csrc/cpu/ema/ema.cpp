// The multi-tensor operators on CPU tensors: momentum update, AdamW step with momentum update, and
// the search for values that are not finite.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "../../common/ema_lists.h"
#include "../../common/stable_abi.h"
#include "../core/isa.h"
#include "kernel.h"

namespace fastvlp {

FASTVLP_DEFINE_KERNELS(EmaKernels, ema)

namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kChunkElements = 1 << 15;
constexpr int64_t kLeastElements = 1 << 14;  // that are worth a thread

struct Nothing {};

TableCache<Nothing>& tables() {
  static auto& cache = *new TableCache<Nothing>;
  return cache;
}

std::shared_ptr<TableCache<Nothing>::Item> table_of(const std::vector<TensorList>& given) {
  return tables().find_or_build(given, kChunkElements);
}

bool is_dense_on_cpu(const Tensor& t) {
  int32_t layout;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  return t.is_cpu() && layout == aoti_torch_layout_strided();
}

// The chunks [next, end) of one thread, from which others take when theirs are done.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// Calls body(entry, geometry, begin, end) for every chunk. A thread takes the same ones in every
// call, as long as it is not late: what fits into the cache near its core stays there.
template <class Body>
void for_each_chunk(const HostTable& host, const Body& body) {
  const TableView table = host.view();
  int64_t elements = 0;
  for (const TableEntry& entry : host.entries) elements += entry.numel;
  const int64_t threads = std::min({int64_t{torch::stable::get_num_threads()}, table.chunks,
                                    std::max<int64_t>(elements / kLeastElements, 1)});
  const auto shares = std::make_unique<Share[]>(threads);
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].next = table.chunks * t / threads;
    shares[t].end = table.chunks * (t + 1) / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    for (int64_t t = 0; t < threads; ++t) {
      Share& share = shares[(first + t) % threads];
      for (int64_t c; (c = share.next.fetch_add(1)) < share.end;) {
        const TableEntry& entry = table.entries[table.chunk_entry[c]];
        const int64_t begin = (c - entry.first_chunk) * table.chunk_elements;
        body(entry, entry.geometry < 0 ? nullptr : table.geometries + entry.geometry, begin,
             std::min(begin + table.chunk_elements, entry.numel));
      }
    }
  });
}

double decay_of(const std::optional<Tensor>& tensor, double value) {
  if (tensor.has_value()) {
    const bool wide = tensor->scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->numel() == 1 &&
                        (wide || tensor->scalar_type() == ScalarType::Float),
                    "decay: expected one float32 or float64 value on the CPU");
    value = wide ? *static_cast<const double*>(tensor->const_data_ptr())
                 : *static_cast<const float*>(tensor->const_data_ptr());
  }
  STD_TORCH_CHECK(is_decay(value), "decay: expected a value between 0 and 1, got ", value);
  return value;
}

bool stopped(const std::optional<Tensor>& nonfinite) {
  if (!nonfinite.has_value()) return false;
  STD_TORCH_CHECK(nonfinite->is_cpu() && nonfinite->numel() == 1 &&
                      nonfinite->scalar_type() == ScalarType::Long,
                  "nonfinite: expected one int64 value on the CPU");
  return *static_cast<const int64_t*>(nonfinite->const_data_ptr()) >= 0;
}

void run_ema(const HostTable& table, const EmaWeights& weights) {
  const auto run = ema_kernels().ema;
  for_each_chunk(table, [&](const TableEntry& entry, const Geometry* geometry, int64_t begin,
                            int64_t end) { run(entry, geometry, begin, end, weights); });
}

void ema_update(const Tensors& momentum, const Tensors& source, const Tensors& copies,
                const std::optional<Tensor>& decay_tensor, double decay,
                const std::optional<Tensor>& nonfinite) {
  const auto item = table_of(ema_lists(momentum, source, copies));
  const EmaWeights weights = ema_weights(decay_of(decay_tensor, decay));
  if (stopped(nonfinite)) return;
  run_ema(item->table, weights);
}

bool ema_update_again(const Tensors& momentum, const Tensors& source, const Tensors& copies,
                      double decay) {
  for (const Tensors* list : {&momentum, &source, &copies})
    if (!std::all_of(list->begin(), list->end(), is_dense_on_cpu)) return false;
  const auto item = tables().find(ema_lists(momentum, source, copies));
  if (item == nullptr) return false;
  run_ema(item->table, ema_weights(decay_of(std::nullopt, decay)));
  return true;
}

void adamw_ema(const Tensors& weights, const Tensors& gradients, const Tensors& first,
               const Tensors& second, const Tensors& momentum, const Tensors& weight_copies,
               const Tensors& momentum_copies, double lr, double beta1, double beta2, double eps,
               double weight_decay, double step, bool maximize,
               const std::optional<Tensor>& decay_tensor, double decay,
               const std::optional<Tensor>& nonfinite) {
  const auto item = table_of(
      adamw_lists(weights, gradients, first, second, momentum, weight_copies, momentum_copies));
  const AdamWFactors factors = adamw_factors(lr, beta1, beta2, eps, weight_decay, step, maximize);
  const EmaWeights ema = ema_weights(decay_of(decay_tensor, decay));
  if (stopped(nonfinite)) return;
  const auto run = ema_kernels().adamw;
  for_each_chunk(item->table, [&](const TableEntry& entry, const Geometry* geometry, int64_t begin,
                                  int64_t end) { run(entry, geometry, begin, end, factors, ema); });
}

Tensor last_exceeding(const Tensors& tensors, double limit) {
  const auto item = table_of(read_list(tensors));
  const auto run = ema_kernels().exceeds;
  std::atomic<int64_t> last{-1};
  for_each_chunk(item->table, [&](const TableEntry& entry, const Geometry* geometry, int64_t begin,
                                  int64_t end) {
    int64_t seen = last.load();
    if (entry.index <= seen || !run(entry, geometry, begin, end, static_cast<float>(limit))) return;
    while (entry.index > seen && !last.compare_exchange_weak(seen, entry.index)) {
    }
  });
  Tensor found = torch::stable::new_empty(tensors.at(0), {}, ScalarType::Long);
  *static_cast<int64_t*>(found.mutable_data_ptr()) = last;
  return found;
}

}  // namespace
}  // namespace fastvlp

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CPU, m) {
  m.impl("ema_update", TORCH_BOX(&fastvlp::ema_update));
  m.impl("adamw_ema", TORCH_BOX(&fastvlp::adamw_ema));
  m.impl("last_exceeding", TORCH_BOX(&fastvlp::last_exceeding));
}

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CompositeExplicitAutograd, m) {
  m.impl("ema_update_again", TORCH_BOX(&fastvlp::ema_update_again));
}
