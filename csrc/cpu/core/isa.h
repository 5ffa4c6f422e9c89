// Which instruction sets this build holds and this CPU runs.
#pragma once

#include <string>

namespace fastvlp {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The name that FASTVLP_CPU_ISA and the build use.
const char* name_of(Isa isa);

struct Isas {
  Isa list[5];
  int count = 0;
  void add(Isa isa) { list[count++] = isa; }
  const Isa* begin() const { return list; }
  const Isa* end() const { return list + count; }
};

// The sets compiled into this build that this CPU can run, fastest first.
const Isas& available_isas();

// The fastest of them, or the one that the environment variable FASTVLP_CPU_ISA names. Throws
// std::runtime_error when that one is unknown here.
Isa chosen_isa();

}  // namespace fastvlp

// Defines `const Kernels& op_kernels()`, the table of the chosen set, over the tables that the
// files compiled once per set export.
#if defined(FASTVLP_X86)
#define FASTVLP_DEFINE_KERNELS(Kernels, op)  \
  const Kernels& op##_kernels_portable();    \
  const Kernels& op##_kernels_avx2();        \
  const Kernels& op##_kernels_avx512();      \
  const Kernels& op##_kernels_avx512_bf16(); \
  const Kernels& op##_kernels_amx();         \
  static const Kernels& op##_kernels() {     \
    switch (chosen_isa()) {                  \
      case Isa::kAmx:                        \
        return op##_kernels_amx();           \
      case Isa::kAvx512Bf16:                 \
        return op##_kernels_avx512_bf16();   \
      case Isa::kAvx512:                     \
        return op##_kernels_avx512();        \
      case Isa::kAvx2:                       \
        return op##_kernels_avx2();          \
      default:                               \
        return op##_kernels_portable();      \
    }                                        \
  }
#else
#define FASTVLP_DEFINE_KERNELS(Kernels, op) \
  const Kernels& op##_kernels_portable();   \
  static const Kernels& op##_kernels() { return op##_kernels_portable(); }
#endif
