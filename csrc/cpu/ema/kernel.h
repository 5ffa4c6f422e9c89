// What the multi-tensor operators (baseline code, owns threads) and their per-instruction-set
// kernels (no allocation, no threads, no torch) say to each other.
#pragma once

#include "../../common/ema_math.h"
#include "../../common/tensor_table.h"

namespace fastvlp {

struct EmaKernels {
  // Elements [begin, end) of an entry of EmaList lists.
  void (*ema)(const TableEntry&, const Geometry*, int64_t begin, int64_t end, EmaWeights);
  // Of AdamWList lists; the momentum and the copies may be absent.
  void (*adamw)(const TableEntry&, const Geometry*, int64_t begin, int64_t end, const AdamWFactors&,
                EmaWeights);
  // Whether an element of the first list exceeds the limit or is NaN.
  bool (*exceeds)(const TableEntry&, const Geometry*, int64_t begin, int64_t end, float limit);
};

}  // namespace fastvlp
