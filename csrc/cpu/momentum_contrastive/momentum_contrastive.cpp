// The momentum-contrastive operator on CPU tensors: argument checks, outputs, call of the driver.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../core/isa.h"
#include "../core/outputs.h"
#include "../core/tensor_args.h"
#include "driver.h"

namespace fastvlp {

FASTVLP_DEFINE_KERNELS(MomentumKernels, momentum)

namespace {

// Null for a tensor of no elements, which stands for "none".
const int64_t* ids_of(const Tensor& t, int64_t n, const char* name) {
  return t.numel() == 0 ? nullptr : int64s_of(t, n, name);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> momentum(
    const Tensor& image, const Tensor& text, const Tensor& image_momentum,
    const Tensor& text_momentum, const Tensor& image_queue, const Tensor& text_queue,
    const Tensor& ids, const Tensor& queue_ids, const Tensor& queue_length,
    const Tensor& temperature, const Tensor& alpha, const Tensor& seed, bool teacher,
    bool gradients, bool negatives, int64_t group_rows, int64_t block_keys) {
  const int64_t batch = image.size(0), dim = image.size(1);
  STD_TORCH_CHECK(batch > 0 && dim > 0, "image: expected at least one row and one column");
  STD_TORCH_CHECK(group_rows > 0 && group_rows % 32 == 0 && block_keys > 0 && block_keys % 32 == 0,
                  "group_rows and block_keys: expected positive multiples of 32");
  const int64_t length = integer_of(queue_length, "queue_length");
  STD_TORCH_CHECK(length >= 0 && length <= image_queue.size(0),
                  "queue_length: expected 0 to the queue's rows, ", image_queue.size(0), ", got ",
                  length);
  const float tau = scalar_of(temperature, "temperature"), mix = scalar_of(alpha, "alpha");
  // Beyond, no finite dot product stands for an excluded key; NaN passes and reaches the loss.
  STD_TORCH_CHECK(!(tau < 1e-36f || tau > 1e36f),
                  "temperature: expected a value from 1e-36 to 1e36, got ", tau);
  MomentumProblem p = {};
  p.ids = ids_of(ids, batch, "ids");
  p.queue_ids = ids_of(queue_ids, image_queue.size(0), "queue_ids");
  STD_TORCH_CHECK(p.ids == nullptr || p.queue_ids != nullptr || length == 0,
                  "queue_ids: expected one id per queue row where ids are given");
  p.batch = batch;
  p.dim = dim;
  p.inverse_temperature = 1.0f / tau;
  p.use_teacher = teacher && mix != 0.0f;
  p.gradients = gradients;
  p.negatives = negatives;
  p.seed = static_cast<uint64_t>(integer_of(seed, "seed"));
  p.group_rows = group_rows;
  // Scratch no larger than these keys need: few touch few fresh pages.
  p.block_keys = std::min(block_keys, (std::max(batch, length) + 31) / 32 * 32);
  MomentumProblem problems[2] = {p, p};
  const Tensor* students[2] = {&image, &text};
  const Tensor* teachers[2] = {&image_momentum, &text_momentum};
  const Tensor* queues[2] = {&image_queue, &text_queue};
  const std::vector<int64_t> sampled = {negatives ? batch : 0}, kept = {gradients ? batch : 0, dim};
  Tensor negative[2] = {empty_tensor(sampled, aoti_torch_dtype_int64()),
                        empty_tensor(sampled, aoti_torch_dtype_int64())};
  Tensor gradient[2] = {empty_tensor(kept, dtype_of(image)), empty_tensor(kept, dtype_of(text))};
  MomentumOutput outputs[2] = {};
  for (int side = 0; side < 2; ++side) {
    MomentumProblem& q = problems[side];
    q.student = features_of(*students[side], "features");
    q.teacher = features_of(*teachers[side], "momentum features");
    q.batch_keys = features_of(*teachers[1 - side], "momentum features");
    q.queue = features_of(*queues[1 - side], "queue");
    for (const Features* m : {&q.student, &q.teacher, &q.queue})
      STD_TORCH_CHECK(m->element == problems[0].student.element,
                      "features and queues: expected one dtype");
    STD_TORCH_CHECK(
        q.student.rows == batch && q.teacher.rows == batch && q.queue.rows == image_queue.size(0),
        "features and queues: expected equal numbers of rows");
    STD_TORCH_CHECK(students[side]->size(1) == dim && teachers[side]->size(1) == dim &&
                        queues[side]->size(1) == dim,
                    "features and queues: expected the same width");
    q.queue.rows = length;
    q.stream = static_cast<uint32_t>(side);
    outputs[side].student = {gradients ? gradient[side].mutable_data_ptr() : nullptr,
                             q.student.element};
    outputs[side].negatives =
        negatives ? static_cast<int64_t*>(negative[side].mutable_data_ptr()) : nullptr;
  }
  const MomentumKernels& kernels = momentum_kernels();
  problems[0].group_rows = problems[1].group_rows = kernels.group_rows(problems[0]);
  momentum_contrastive(problems, kernels, run_parallel, torch::stable::get_num_threads(), mix, 0.5,
                       outputs);
  return {scalar_tensor(0.5 * (outputs[0].loss + outputs[1].loss)),
          gradient[0],
          gradient[1],
          scalar_tensor(outputs[0].temperature_gradient + outputs[1].temperature_gradient),
          negative[0],
          negative[1]};
}

}  // namespace
}  // namespace fastvlp

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CPU, m) {
  m.impl("momentum_contrastive", TORCH_BOX(&fastvlp::momentum));
}
