// How a function is declared that the CPU build and the CUDA build share.
#pragma once

#if defined(__CUDACC__)
#define FASTVLP_HD __host__ __device__ __forceinline__
#else
// Internal linkage: the CPU kernels compile these headers once per instruction set, and the linker
// must not share one of those copies with code that runs on older CPUs.
#define FASTVLP_HD static inline
#endif
