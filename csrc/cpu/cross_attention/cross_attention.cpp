// The attention operators on CPU tensors: argument checks, outputs, and one task per segment and
// head, taken by whichever thread is free. Tasks share nothing, so the order does not matter.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../core/isa.h"
#include "../core/outputs.h"
#include "../core/scratch.h"
#include "../core/tensor_args.h"
#include "kernel.h"

namespace fastvlp {

FASTVLP_DEFINE_KERNELS(AttentionKernels, attention)

namespace {

AttentionStrides strides_of(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return {t.stride(0), t.stride(last - 2), t.stride(last - 1)};
}

AttentionInput input_of(const Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.numel() == 0 || t.size(last) <= 1 || t.stride(last) == 1, name,
                  ": expected unit stride along the last dim");
  return {strides_of(t), t.const_data_ptr()};
}

AttentionOutput output_of(Tensor& t) { return {strides_of(t), t.mutable_data_ptr()}; }

std::vector<int64_t> starts_of(const Tensor& t, const char* name, int64_t total) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) >= 1 && t.is_contiguous(), name,
                  ": expected contiguous [segments + 1]");
  const bool narrow = t.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(narrow || t.scalar_type() == ScalarType::Long, name, ": expected int32 or int64");
  std::vector<int64_t> starts(t.size(0));
  for (size_t i = 0; i < starts.size(); ++i) {
    starts[i] = narrow ? static_cast<const int32_t*>(t.const_data_ptr())[i]
                       : static_cast<const int64_t*>(t.const_data_ptr())[i];
    STD_TORCH_CHECK(starts[i] >= (i ? starts[i - 1] : 0), name,
                    ": expected values that start at 0 and never decrease, got ", starts[i],
                    " at position ", i);
  }
  STD_TORCH_CHECK(starts.front() == 0 && starts.back() == total, name,
                  ": expected to run from 0 to the number of rows, ", total, ", got ",
                  starts.front(), " to ", starts.back());
  return starts;
}

// The segments of a call, and which of their keys are attended.
class Segments {
 public:
  Segments(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q,
           const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& key_mask)
      : queries_(starts_of(cu_seqlens_q, "cu_seqlens_q", q.size(0))), packed_(k.dim() == 3) {
    STD_TORCH_CHECK(packed_ == cu_seqlens_k.has_value(),
                    "cu_seqlens_k: expected with k [rows, heads, dim] and only then");
    keys_ = packed_ ? starts_of(*cu_seqlens_k, "cu_seqlens_k", k.size(0))
                    : std::vector<int64_t>(k.size(0) + 1);
    STD_TORCH_CHECK(keys_.size() == queries_.size(),
                    "cu_seqlens_q: expected one segment per segment of keys, ", keys_.size() - 1,
                    ", got ", queries_.size() - 1);
    for (int64_t i = 0; !packed_ && i <= k.size(0); ++i) keys_[i] = i * k.size(1);
    if (key_mask.has_value()) find_attended(*key_mask);
    for (int64_t i = 0; i < count(); ++i) {
      most_queries = std::max(most_queries, queries_[i + 1] - queries_[i]);
      most_keys = std::max(most_keys, task(i, 0).attended_keys);
    }
  }

  int64_t count() const { return static_cast<int64_t>(queries_.size()) - 1; }

  AttentionTask task(int64_t segment, int64_t head) const {
    AttentionTask t = {};
    t.head = head;
    t.first_query = queries_[segment];
    t.queries = queries_[segment + 1] - t.first_query;
    t.segment = packed_ ? keys_[segment] : segment;
    t.keys = keys_[segment + 1] - keys_[segment];
    t.attended_keys = t.keys;
    if (!attended_starts_.empty()) {
      t.attended = attended_.data() + attended_starts_[segment];
      t.attended_keys = attended_starts_[segment + 1] - attended_starts_[segment];
    }
    return t;
  }

  int64_t most_queries = 0;
  int64_t most_keys = 0;  // attended ones

 private:
  void find_attended(const Tensor& mask) {
    const bool* at = bools_of(mask, keys_.back(), "key_mask");
    for (int64_t i = 0; i < count(); ++i) {
      attended_starts_.push_back(static_cast<int64_t>(attended_.size()));
      for (int64_t key = keys_[i]; key < keys_[i + 1]; ++key)
        if (at[key]) attended_.push_back(static_cast<int32_t>(key - keys_[i]));
    }
    attended_starts_.push_back(static_cast<int64_t>(attended_.size()));
  }

  std::vector<int64_t> queries_, keys_, attended_starts_;
  std::vector<int32_t> attended_;
  bool packed_;
};

// Outputs of more bytes than stay in the caches near the cores: the next operator finds little of
// them there, and writing past the caches spares reading the lines first.
constexpr int64_t kCachedBytes = int64_t{1} << 20;

AttentionProblem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& seed,
                            double scale, double dropout_p, bool causal) {
  STD_TORCH_CHECK(q.dim() == 3 && (k.dim() == 3 || k.dim() == 4) && v.dim() == k.dim(),
                  "q, k, v: expected [rows, heads, dim] and keys [segments, keys, heads, dim] or "
                  "[rows, heads, dim]");
  const int64_t last = k.dim() - 1;
  STD_TORCH_CHECK(q.size(1) > 0 && q.size(2) > 0, "q: expected at least one head and a width");
  for (int64_t i = 0; i <= last; ++i)
    STD_TORCH_CHECK(k.size(i) == v.size(i), "v: expected the shape of k");
  STD_TORCH_CHECK(k.size(last) == q.size(2) && k.size(last - 1) == q.size(1),
                  "k: expected the heads and the width of q");
  AttentionProblem p = {};
  p.q = input_of(q, "q");
  p.k = input_of(k, "k");
  p.v = input_of(v, "v");
  p.element = element_of(q, "q");
  STD_TORCH_CHECK(element_of(k, "k") == p.element && element_of(v, "v") == p.element,
                  "k, v: expected the dtype of q");
  p.heads = q.size(1);
  p.dim = q.size(2);
  p.total_queries = q.size(0);
  constexpr double kLargest = std::numeric_limits<float>::max();
  STD_TORCH_CHECK(scale >= -kLargest && scale <= kLargest,
                  "scale: expected a finite number of float32, got ", scale);
  p.scale = static_cast<float>(scale);
  p.causal = causal;
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p: expected in [0, 1), got ",
                  dropout_p);
  p.drop_below = static_cast<uint32_t>(dropout_p * 4294967296.0);
  p.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  p.seed = static_cast<uint64_t>(integer_of(seed, "seed"));
  return p;
}

// Calls work(task, scratch) for every segment and head. A thread takes several heads of a segment
// one after another where there is enough work for all threads: their rows lie in the same pages,
// and looking those up anew for each head takes longer than the matmuls.
template <class Work>
void for_each_task(const Segments& segments, int64_t heads, int64_t scratch_floats,
                   const Work& work) {
  const int64_t tasks = segments.count() * heads;
  const int64_t slots = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (slots == 0) return;
  const int64_t run = std::clamp<int64_t>(tasks / (4 * slots), 1, heads);
  const int64_t runs = (heads + run - 1) / run;
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, slots, 1, [&](int64_t, int64_t) {
    const Buffer scratch = allocate_floats(scratch_floats);
    const auto head_of = [&](int64_t run_index) { return run_index % runs * run; };
    for (int64_t i = next++, following; i < segments.count() * runs; i = following) {
      following =
          next++;  // taken early, so that its first head is known while this one's last runs
      const int64_t first = head_of(i), end = std::min(heads, first + run);
      AttentionTask next_run = {};
      const bool more = following < segments.count() * runs;
      if (more) next_run = segments.task(following / runs, head_of(following));
      next_run.run = std::min(heads - next_run.head, run);
      for (int64_t head = first; head < end; ++head) {
        AttentionTask task = segments.task(i / runs, head), after;
        task.next_run = task.next = more ? &next_run : nullptr;
        if (head + 1 < end) after = segments.task(i / runs, head + 1), task.next = &after;
        task.run = end - first, task.place = head - first;
        work(task, scratch.get());
      }
    }
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& cu_seqlens_q,
                                   const std::optional<Tensor>& cu_seqlens_k,
                                   const std::optional<Tensor>& key_mask, const Tensor& seed,
                                   double scale, double dropout_p, bool causal, int64_t, int64_t) {
  AttentionProblem p = problem_of(q, k, v, seed, scale, dropout_p, causal);
  p.streams = q.numel() * bytes_of(p.element) > kCachedBytes;
  const Segments segments(q, k, cu_seqlens_q, cu_seqlens_k, key_mask);
  Tensor out = empty_output(q);
  Tensor statistics = torch::stable::new_empty(q, {2, p.heads, q.size(0)}, ScalarType::Float);
  const AttentionForward outputs = {output_of(out), mutable_floats_of(statistics)};
  const AttentionKernels& kernels = attention_kernels();
  for_each_task(segments, p.heads,
                kernels.forward_scratch(p, segments.most_queries, segments.most_keys),
                [&](const AttentionTask& task, float* scratch) {
                  kernels.forward(p, task, outputs, scratch);
                });
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& out,
                                            const Tensor& statistics, const Tensor& cu_seqlens_q,
                                            const std::optional<Tensor>& cu_seqlens_k,
                                            const std::optional<Tensor>& key_mask,
                                            const Tensor& seed, double scale, double dropout_p,
                                            bool causal, int64_t, int64_t) {
  AttentionProblem p = problem_of(q, k, v, seed, scale, dropout_p, causal);
  p.grad = input_of(grad, "grad");
  p.streams = (q.numel() + k.numel() + v.numel()) * bytes_of(p.element) > kCachedBytes;
  STD_TORCH_CHECK(element_of(grad, "grad") == p.element, "grad: expected the dtype of q");
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == q.size(0) && grad.size(1) == p.heads &&
                      grad.size(2) == p.dim,
                  "grad: expected the shape of q");
  STD_TORCH_CHECK(
      element_of(out, "out") == p.element && out.is_contiguous() && out.numel() == q.numel(),
      "out: expected that of the forward pass");
  const Segments segments(q, k, cu_seqlens_q, cu_seqlens_k, key_mask);
  Tensor dq = empty_gradient(q), dk = empty_gradient(k), dv = empty_gradient(v);
  const AttentionBackward outputs = {input_of(out, "out"),
                                     floats_of(statistics, 2 * p.heads * q.size(0), "statistics"),
                                     output_of(dq), output_of(dk), output_of(dv)};
  const AttentionKernels& kernels = attention_kernels();
  for_each_task(segments, p.heads,
                kernels.backward_scratch(p, segments.most_queries, segments.most_keys),
                [&](const AttentionTask& task, float* scratch) {
                  kernels.backward(p, task, outputs, scratch);
                });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace fastvlp

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CPU, m) {
  m.impl("cross_attention_forward", TORCH_BOX(&fastvlp::forward));
  m.impl("cross_attention_backward", TORCH_BOX(&fastvlp::backward));
}
