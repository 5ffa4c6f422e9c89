// Which instruction sets this build holds and this processor runs.
#pragma once

#include <string>
#include <vector>

#include "contrastive_kernel.h"
#include "word_patch_alignment_kernel.h"

namespace fastvlp {

// The kernels compiled into this build that this processor can run, fastest first.
std::vector<const ContrastiveKernels*> available_contrastive_kernels();

// The fastest of them, or the one that the environment variable FASTVLP_CPU_ISA names. Throws
// std::runtime_error when that one is unknown here.
const ContrastiveKernels& contrastive_kernels();

// The same choice for the other operators.
const WordPatchAlignmentKernels& word_patch_alignment_kernels();

}  // namespace fastvlp
