// Images of three 8-bit channels to their places in a batch of normalised floats.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../core/isa.h"
#include "../core/tensor_args.h"
#include "kernel.h"

namespace fastvlp {

FASTVLP_DEFINE_KERNELS(ImagesKernels, images)

namespace {

constexpr int64_t kPlanFields = 14, kOperationFields = 8;

void check_table(const Tensor& t, ScalarType type, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(1) == columns && t.scalar_type() == type &&
                      t.is_contiguous(),
                  name, ": expected a contiguous CPU tensor with ", columns, " columns");
}

bool inside(const Box& box, int64_t width, int64_t height) {
  return box.left >= 0 && box.top >= 0 && box.width > 0 && box.height > 0 &&
         box.width <= width - box.left && box.height <= height - box.top;
}

std::vector<Operation> operations_of(const Tensor& t) {
  const double* values = static_cast<const double*>(t.const_data_ptr());
  std::vector<Operation> found(t.size(0));
  for (int64_t i = 0; i < t.size(0); ++i, values += kOperationFields) {
    STD_TORCH_CHECK(values[0] >= 0 && values[0] < static_cast<double>(Augment::kCount),
                    "operations: no kind ", values[0]);
    found[i] = {static_cast<Augment>(static_cast<int64_t>(values[0])), values + 1};
  }
  return found;
}

ImagePlan plan_of(const int64_t* f, const std::vector<Operation>& operations, bool may_start_down) {
  const int64_t first = f[11], before = f[12], after = f[13];
  const int64_t count = static_cast<int64_t>(operations.size());
  STD_TORCH_CHECK(
      first >= 0 && before >= 0 && after >= 0 && first <= count && before + after <= count - first,
      "plans: operations out of range");
  const Operation* o = operations.data() + first;
  return {{f[0], f[1], f[2], f[3]},
          f[4],
          f[5],
          {f[6], f[7], f[8], f[9]},
          f[10] != 0,
          may_start_down,
          o,
          o + before,
          before,
          after};
}

// Serial: a loader has its own threads, each of which calls this for a part of a batch.
void transform_images(const std::vector<Tensor>& images, const Tensor& plans,
                      const Tensor& operations, const Tensor& table, bool may_start_down,
                      Tensor out) {
  check_table(plans, ScalarType::Long, kPlanFields, "plans");
  check_table(operations, ScalarType::Double, kOperationFields, "operations");
  check_table(table, ScalarType::Float, 256, "table");
  const int64_t n = static_cast<int64_t>(images.size());
  STD_TORCH_CHECK(table.size(0) == 3, "table: expected 3 rows, got ", table.size(0));
  STD_TORCH_CHECK(plans.size(0) == n, "plans: expected ", n, " rows, got ", plans.size(0));
  STD_TORCH_CHECK(out.is_cpu() && out.dim() == 4 && out.size(0) == n && out.size(1) == 3 &&
                      out.scalar_type() == ScalarType::Float && out.is_contiguous(),
                  "out: expected a contiguous float32 tensor of the CPU, [", n, ", 3, H, W]");
  const std::vector<Operation> all = operations_of(operations);
  const int64_t height = out.size(2), width = out.size(3);
  thread_local ImageScratch scratch;
  for (int64_t i = 0; i < n; ++i) {
    const Tensor& t = images[i];
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == 3 && t.size(2) == 3 && t.is_contiguous() &&
                        t.scalar_type() == ScalarType::Byte,
                    "images: expected contiguous uint8 tensors [height, width, 3] of the CPU");
    const ImagePlan plan = plan_of(
        static_cast<const int64_t*>(plans.const_data_ptr()) + i * kPlanFields, all, may_start_down);
    STD_TORCH_CHECK(inside(plan.crop, t.size(1), t.size(0)) &&
                        inside(plan.window, plan.width, plan.height) &&
                        plan.window.width <= width && plan.window.height <= height,
                    "plans: row ", i, " has a box that is empty or does not fit");
    images_kernels().transform(
        {static_cast<const uint8_t*>(t.const_data_ptr()), 3 * t.size(1), t.size(1), t.size(0)},
        plan, floats_of(table), {mutable_floats_of(out) + i * 3 * height * width, width, height},
        scratch);
  }
}

}  // namespace
}  // namespace fastvlp

STABLE_TORCH_LIBRARY_IMPL(fastvlp, CPU, m) {
  m.impl("transform_images", TORCH_BOX(&fastvlp::transform_images));
}
