// The attention kernels for one instruction set. Compiled once per set with FASTVLP_ISA naming it;
// everything but the one exported table has internal linkage.
#include <algorithm>

#include "../core/isa_name.h"
#include "few_queries.h"
#include "kernel.h"
#include "pass.h"
#include "short_segment.h"
#include "tile_backward.h"
#include "tile_forward.h"
#include "unpacked_backward.h"
#include "unpacked_forward.h"

namespace {

#if defined(__AVX512BF16__)
#define FASTVLP_WITH_MATMULS(function, p)                                          \
  ((p).element == fastvlp::Element::kBFloat16 ? function<SimdMatmuls<BFloat16Dot>> \
                                              : function<SimdMatmuls<FloatDot>>)
#else
#define FASTVLP_WITH_MATMULS(function, p) (function<SimdMatmuls<FloatDot>>)
#endif

constexpr int kFewQueriesDim = 64;

bool takes_few_queries(const AttentionProblem& p, const AttentionTask& task) {
  const int64_t most = p.element == Element::kFloat32    ? kFewQueries
                       : p.element == Element::kBFloat16 ? kFewBFloat16Queries
                                                         : 0;
  return p.dim == kFewQueriesDim && p.drop_below == 0 && task.queries > 0 && task.queries <= most;
}

// Whether the task was one of a few rows, and has been done.
template <class Out>
bool run_small(const AttentionProblem& p, const AttentionTask& task, const Out& out,
               float* scratch) {
  if (takes_few_queries(p, task)) {
    if (p.element == Element::kFloat32)
      FewQueries<float, kFewQueriesDim>(p, task, scratch).run(out);
    else
      FewQueries<uint16_t, kFewQueriesDim>(p, task, scratch).run(out);
    return true;
  }
  if (!ShortSegment::takes(p, task)) return false;
  ShortSegment(p, task, scratch).run(out);
  return true;
}

// Of the passes that serve some tasks of any instruction set.
int64_t small_task_floats(const AttentionProblem& p, int64_t attended_keys) {
  return std::max(FewQueries<float, kFewQueriesDim>::scratch_floats(attended_keys),
                  ShortSegment::scratch_floats(p));
}

#if defined(__AMX_BF16__)

template <template <class, int> class Pass, class... Arguments>
int64_t pass_floats(const AttentionProblem& p, Arguments... arguments) {
  if (p.element == fastvlp::Element::kBFloat16)
    return
        typename Pass<BFloat16Rows, 0>::Layout(TileShape<BFloat16Rows>(p.dim), arguments...).total;
  return typename Pass<FloatRows, 0>::Layout(TileShape<FloatRows>(p.dim), arguments...).total;
}

template <template <class, int> class Pass, class Rows, class Out>
bool run_rows(const AttentionProblem& p, const AttentionTask& task, const Out& out,
              float* scratch) {
  if (p.dim == 64) return Pass<Rows, 64>(p, task, out, scratch).run();
  return Pass<Rows, 0>(p, task, out, scratch).run();
}

// For fewer weights, splitting floats into bf16 parts costs more than the faster matmuls gain.
constexpr int64_t kLeastWeights = 4096;

// Whether the task has been done.
template <template <class, int> class Pass, class Out>
bool run_on_tiles(const AttentionProblem& p, const AttentionTask& task, const Out& out,
                  float* scratch) {
  if (p.element != fastvlp::Element::kBFloat16 && task.queries * task.attended_keys < kLeastWeights)
    return false;
  switch (p.element) {
    case fastvlp::Element::kBFloat16:
      return run_rows<Pass, BFloat16Rows>(p, task, out, scratch);
    case fastvlp::Element::kFloat16:
      return run_rows<Pass, HalfRows>(p, task, out, scratch);
    default:
      return run_rows<Pass, FloatRows>(p, task, out, scratch);
  }
}

constexpr int kUnpackedDim = 64;
using UnpackedForwardPass = UnpackedForward<kUnpackedDim>;
using UnpackedBackwardPass = UnpackedBackward<kUnpackedDim>;

bool takes_unpacked(const AttentionProblem& p) {
  return p.element == fastvlp::Element::kBFloat16 && p.dim == kUnpackedDim;
}

#endif

int64_t forward_scratch(const AttentionProblem& p, int64_t queries, int64_t attended_keys) {
#if defined(__AMX_BF16__)
  const int64_t tiles = takes_unpacked(p) ? UnpackedForwardPass::Layout().total
                                          : pass_floats<TileForward>(p, queries, attended_keys);
#else
  const int64_t tiles = 0;
#endif
  return std::max({tiles, small_task_floats(p, attended_keys),
                   FASTVLP_WITH_MATMULS(scratch_floats_with, p)(p, queries, attended_keys, false)});
}

int64_t backward_scratch(const AttentionProblem& p, int64_t queries, int64_t attended_keys) {
#if defined(__AMX_BF16__)
  int64_t tiles = pass_floats<TileBackward>(p, queries);
  if (takes_unpacked(p)) tiles = std::max(tiles, UnpackedBackwardPass::Layout(attended_keys).total);
#else
  const int64_t tiles = 0;
#endif
  return std::max({tiles, small_task_floats(p, attended_keys),
                   FASTVLP_WITH_MATMULS(scratch_floats_with, p)(p, queries, attended_keys, true)});
}

void forward_once(const AttentionProblem& p, const AttentionTask& task, const AttentionForward& out,
                  float* scratch) {
  if (run_small(p, task, out, scratch)) return;
#if defined(__AMX_BF16__)
  if (takes_unpacked(p)) return UnpackedForwardPass(p, task, out, scratch).run();
  if (run_on_tiles<TileForward>(p, task, out, scratch)) return;
#endif
  FASTVLP_WITH_MATMULS(forward_with, p)(p, task, out, scratch, false);
}

void forward(const AttentionProblem& p, const AttentionTask& task, const AttentionForward& out,
             float* scratch) {
  forward_once(p, task, out, scratch);
  if (is_coarse(p, task, out.statistics))
    FASTVLP_WITH_MATMULS(forward_with, p)(p, task, out, scratch, true);
}

void backward(const AttentionProblem& p, const AttentionTask& task, const AttentionBackward& out,
              float* scratch) {
  const bool relative = is_relative(p, task, out.statistics);
  if (!relative && run_small(p, task, out, scratch)) return;
#if defined(__AMX_BF16__)
  if (!relative) {
    if (takes_unpacked(p) && task.queries <= UnpackedBackwardPass::kMostQueries)
      return UnpackedBackwardPass(p, task, out, scratch).run();
    if (run_on_tiles<TileBackward>(p, task, out, scratch)) return;
  }
#endif
  FASTVLP_WITH_MATMULS(backward_with, p)(p, task, out, scratch);
}

}  // namespace

namespace fastvlp {

const AttentionKernels& FASTVLP_JOIN(attention_kernels_, FASTVLP_ISA)() {
  static constexpr AttentionKernels table = {forward_scratch, backward_scratch, forward, backward};
  return table;
}

}  // namespace fastvlp
