// Four neighbours stored in one access.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

namespace fastvlp::cuda {

// `at` is a multiple of four elements. An intrinsic stores them: of a plain assignment the compiler
// makes a store for each element, and four times the requests.
template <class T>
__device__ __forceinline__ void store_four(T* at, const T (&values)[4]) {
  std::conditional_t<sizeof(T) == 4, uint4, uint2> raw;
  static_assert(sizeof(raw) == sizeof(values), "four elements of 2 or 4 bytes");
  memcpy(&raw, values, sizeof(raw));
  __stwb(reinterpret_cast<decltype(raw)*>(at), raw);
}

}  // namespace fastvlp::cuda
