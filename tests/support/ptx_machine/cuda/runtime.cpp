// As much of the CUDA runtime and of torch's CUDA side as csrc/cuda asks for. A launch goes to a
// function that Python sets, and is over when that returns. Python also sets what torch and the
// device tell of themselves (`State`).
#include <cuda_runtime_api.h>

#include <cstdint>
#include <unordered_map>

namespace {

// Returns 0, or another number where the kernel failed. The arguments are pointers to them.
using Launcher = int (*)(const char* kernel, const unsigned* grid, const unsigned* block,
                         uint64_t shared_bytes, void** arguments);

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
};

// The current devices are two: torch's, and the driver's, which is where launches go. Both are set
// by torch, the second one alone by the runtime that csrc/cuda calls.
struct State {
  int32_t torch_device;
  int32_t driver_device;
  int64_t stream;  // torch's current one
  int32_t capturing;
  int32_t events_reached;
};

State state = {0, 0, 0, 0, 1};
Launcher launcher = nullptr;
Configuration configured;
cudaError_t last_error = cudaSuccess;

// By the address of the host's stub.
std::unordered_map<const void*, const char*>& kernel_names() {
  static auto& names = *new std::unordered_map<const void*, const char*>;
  return names;
}

cudaError_t launch(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes) {
  const unsigned blocks[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
  const auto found = kernel_names().find(stub);
  if (found == kernel_names().end())
    last_error = cudaErrorInvalidDeviceFunction;
  else if (launcher == nullptr || launcher(found->second, blocks, threads, shared_bytes, arguments))
    last_error = cudaErrorLaunchFailure;
  return last_error;
}

}  // namespace

extern "C" {

void fastvlp_ptx_set_launcher(Launcher given) { launcher = given; }
State* fastvlp_ptx_state() { return &state; }

// What code compiled by nvcc calls at its start and for kernel<<<...>>>().
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  kernel_names()[stub] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st*) {
  configured = {grid, block, shared_bytes};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
  *grid = configured.grid;
  *block = configured.block;
  *shared_bytes = configured.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = nullptr;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t) {
  return launch(kernel, grid, block, arguments, shared_bytes);
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 2;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  state.driver_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure           ? "the launch failed"
         : error == cudaErrorInvalidDeviceFunction ? "the kernel is unknown"
                                                   : "unknown error";
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* stub) {
  return kernel_names().count(stub) ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = state.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(&state);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) {
  return state.events_reached ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

// What torch has of CUDA.
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = reinterpret_cast<void*>(state.stream);
  return 0;
}
// A guard is the device that was torch's before, one more: null is no guard.
int32_t aoti_torch_create_device_guard(int32_t device, void** guard) {
  *guard = reinterpret_cast<void*>(static_cast<intptr_t>(state.torch_device) + 1);
  state.torch_device = state.driver_device = device;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void* guard) {
  state.torch_device = static_cast<int32_t>(reinterpret_cast<intptr_t>(guard) - 1);
  state.driver_device = state.torch_device;
  return 0;
}

}  // extern "C"
