// The attention kernels for one instruction set. Compiled once per set with FASTVLP_ISA naming it;
// everything but the one exported table has internal linkage.
#include "attention_kernel.h"
#include "attention_pass.h"
#include "attention_tiles.h"
#include "isa_name.h"

namespace {

#if defined(__AMX_BF16__)
#define FASTVLP_WITH_PRODUCTS(function, p)                             \
  ((p).element == fastvlp::Element::kBFloat16 ? function<TileProducts> \
                                              : function<DotProducts<FloatDot>>)
#elif defined(__AVX512BF16__)
#define FASTVLP_WITH_PRODUCTS(function, p)                                       \
  ((p).element == fastvlp::Element::kBFloat16 ? function<DotProducts<BFloat16Dot>> \
                                              : function<DotProducts<FloatDot>>)
#else
#define FASTVLP_WITH_PRODUCTS(function, p) (function<DotProducts<FloatDot>>)
#endif

int64_t forward_scratch(const AttentionProblem& p, int64_t queries, int64_t seen_keys) {
  return FASTVLP_WITH_PRODUCTS(scratch_floats_with, p)(p, queries, seen_keys, false);
}

int64_t backward_scratch(const AttentionProblem& p, int64_t queries, int64_t seen_keys) {
  return FASTVLP_WITH_PRODUCTS(scratch_floats_with, p)(p, queries, seen_keys, true);
}

void forward(const AttentionProblem& p, const AttentionTask& task, const AttentionForward& out,
             float* scratch) {
  FASTVLP_WITH_PRODUCTS(forward_with, p)(p, task, out, scratch);
}

void backward(const AttentionProblem& p, const AttentionTask& task, const AttentionBackward& out,
              float* scratch) {
  FASTVLP_WITH_PRODUCTS(backward_with, p)(p, task, out, scratch);
}

}  // namespace

namespace fastvlp {

const AttentionKernels& FASTVLP_JOIN(attention_kernels_, FASTVLP_ISA)() {
  static constexpr AttentionKernels table = {forward_scratch, backward_scratch, forward, backward};
  return table;
}

}  // namespace fastvlp
