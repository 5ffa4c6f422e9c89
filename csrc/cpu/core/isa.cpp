#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(FASTVLP_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastvlp {
namespace {

#if defined(FASTVLP_X86)
// AMX needs CPU support and, on Linux, a permission that a process requests once.
bool amx_usable() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = d >> 24 & 1, bf16 = d >> 22 & 1;
  return tiles && bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isas find_isas() {
  Isas found;
#if defined(FASTVLP_X86)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && amx_usable()) found.add(Isa::kAmx);
  if (bf16) found.add(Isa::kAvx512Bf16);
  if (avx512) found.add(Isa::kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.add(Isa::kAvx2);
#endif
  found.add(Isa::kPortable);
  return found;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

const Isas& available_isas() {
  static const Isas found = find_isas();
  return found;
}

Isa chosen_isa() {
  const Isas& found = available_isas();
  const char* forced = std::getenv("FASTVLP_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return *found.begin();
  std::string names;
  for (const Isa isa : found) {
    if (std::string(name_of(isa)) == forced) return isa;
    names += names.empty() ? name_of(isa) : std::string(", ") + name_of(isa);
  }
  throw std::runtime_error("FASTVLP_CPU_ISA: expected one of " + names + ", got '" + forced +
                           "'; unset it to use the fastest");
}

}  // namespace fastvlp
