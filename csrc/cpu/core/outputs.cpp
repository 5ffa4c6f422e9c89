#include "outputs.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

#include "../../common/stable_abi.h"
#include "scratch.h"

namespace fastvlp {
namespace {

using torch::stable::Tensor;

// For blocks beyond some such size malloc maps fresh pages at every call, and the system clears
// them, which can take as long as computing what they shall hold.
constexpr int64_t kLargeBytes = int64_t{4} << 20;

void release_memory(void* data, void* context) {
  const Buffer owned(static_cast<float*>(data), *static_cast<BufferDeleter*>(context));
  delete static_cast<BufferDeleter*>(context);
}

using Numbers = std::vector<int64_t>;

Numbers sizes_of(const Tensor& t) {
  Numbers sizes(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) sizes[i] = t.size(i);
  return sizes;
}

// Whether elements leave no gaps and no two share a place.
bool is_dense(const Numbers& sizes, const Numbers& strides) {
  Numbers inwards(sizes.size());
  std::iota(inwards.begin(), inwards.end(), int64_t{0});
  std::sort(inwards.begin(), inwards.end(),
            [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  int64_t elements = 1;
  for (auto i = inwards.rbegin(); i != inwards.rend(); ++i) {
    if (sizes[*i] > 1 && strides[*i] != elements) return false;
    elements *= sizes[*i];
  }
  return true;
}

Numbers contiguous_strides(const Numbers& sizes) {
  Numbers strides(sizes.size());
  std::exclusive_scan(sizes.rbegin(), sizes.rend(), strides.rbegin(), int64_t{1},
                      std::multiplies<>());
  return strides;
}

Tensor from_torch(const Numbers& sizes, const Numbers& strides, int32_t dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype, aoti_torch_device_type_cpu(), -1, &handle));
  return Tensor(handle);
}

Tensor empty_strided(const Tensor& t, const Numbers& sizes, const Numbers& strides) {
  const int64_t dims = static_cast<int64_t>(sizes.size());
  const int64_t elements =
      std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
  const int64_t bytes = elements * static_cast<int64_t>(t.element_size());
  const int32_t dtype = dtype_of(t);
  if (torch_from_blob == nullptr || bytes < kLargeBytes) {
    Tensor out = from_torch(sizes, strides, dtype);
    advise_huge_pages(out.mutable_data_ptr(), bytes);
    return out;
  }
  AtenTensorHandle handle;
  Buffer buffer = allocate_floats((bytes + 3) / 4);
  auto* context = new BufferDeleter(buffer.get_deleter());
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
      buffer.get(), dims, sizes.data(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(), -1,
      &handle, aoti_torch_layout_strided(), nullptr, 0, release_memory, context));
  buffer.release();
  return Tensor(handle);
}

}  // namespace

Tensor empty_tensor(const std::vector<int64_t>& sizes, int32_t dtype) {
  return from_torch(sizes, contiguous_strides(sizes), dtype);
}

int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

Tensor scalar_tensor(double value) {
  Tensor t = empty_tensor({}, aoti_torch_dtype_float32());
  *static_cast<float*>(t.mutable_data_ptr()) = static_cast<float>(value);
  return t;
}

Tensor empty_output(const Tensor& t) { return empty_output(t, sizes_of(t)); }

Tensor empty_output(const Tensor& t, const std::vector<int64_t>& sizes) {
  return empty_strided(t, sizes, contiguous_strides(sizes));
}

Tensor empty_gradient(const Tensor& t) {
  const Numbers sizes = sizes_of(t);
  Numbers strides(sizes.size());
  for (int64_t i = 0; i < t.dim(); ++i) strides[i] = t.stride(i);
  return is_dense(sizes, strides) ? empty_strided(t, sizes, strides) : empty_output(t, sizes);
}

}  // namespace fastvlp
