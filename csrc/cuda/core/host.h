// What the operators' host code shares: the device and the stream that their work goes to.
#pragma once

#ifndef USE_CUDA
#define USE_CUDA  // for aoti_torch_get_current_cuda_stream
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "../../common/stable_abi.h"
#include "queue.h"

namespace fastvlp::cuda {

// An operator holds one while it queues work for a device, which is torch's current one meanwhile.
//
// The kernels are launched by a CUDA runtime of our own (launch.h), which makes the device the
// driver's current one. Only torch can put back the device that was current before: our runtime
// does not know what torch has told its own.
class DeviceScope {
 public:
  explicit DeviceScope(int device) : guard_(device), device_(device) {}
  explicit DeviceScope(const torch::stable::Tensor& t) : DeviceScope(t.get_device_index()) {}

  // Torch's current stream of the device.
  Queue queue() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return {device_, stream};
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int device_;
};

inline void require_success(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "fastvlp's CUDA kernels could not be queued: ", error);
}

}  // namespace fastvlp::cuda
