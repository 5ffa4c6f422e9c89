#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace fastvlp {

std::vector<const ContrastiveKernels*> available_contrastive_kernels() {
  std::vector<const ContrastiveKernels*> found;
#if defined(FASTVLP_X86)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512 && __builtin_cpu_supports("avx512bf16"))
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

const WordPatchAlignmentKernels& word_patch_alignment_kernels() {
  const std::string name = contrastive_kernels().name;
#if defined(FASTVLP_X86)
  if (name == "avx512_bf16") return word_patch_alignment_kernels_avx512_bf16();
  if (name == "avx512") return word_patch_alignment_kernels_avx512();
  if (name == "avx2") return word_patch_alignment_kernels_avx2();
#endif
  return word_patch_alignment_kernels_portable();
}

}  // namespace fastvlp
