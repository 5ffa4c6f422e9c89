#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(FASTVLP_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastvlp {
namespace {

#if defined(FASTVLP_X86)
// Linux hands out the matrix unit's registers only to a process that has asked.
bool matrix_unit_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

}  // namespace

std::vector<const ContrastiveKernels*> available_contrastive_kernels() {
  std::vector<const ContrastiveKernels*> found;
#if defined(FASTVLP_X86)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
      matrix_unit_granted())
    found.push_back(&contrastive_kernels_amx_bf16());
  if (bf16)
    found.push_back(&contrastive_kernels_avx512_bf16());
  if (avx512) found.push_back(&contrastive_kernels_avx512());
  if (avx2) found.push_back(&contrastive_kernels_avx2());
#endif
  found.push_back(&contrastive_kernels_portable());
  return found;
}

const ContrastiveKernels& contrastive_kernels() {
  const auto found = available_contrastive_kernels();
  const char* forced = std::getenv("FASTVLP_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return *found.front();
  std::string names;
  for (const auto* kernels : found) {
    if (std::string(kernels->name) == forced) return *kernels;
    names += names.empty() ? kernels->name : std::string(", ") + kernels->name;
  }
  throw std::runtime_error("FASTVLP_CPU_ISA: expected one of " + names + ", got '" + forced +
                           "'; unset it to use the fastest");
}

}  // namespace fastvlp
