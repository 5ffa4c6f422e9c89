// The momentum update and the AdamW step for one instruction set; compiled once per set with
// FASTVLP_ISA naming it. Everything is bound by memory: each stream is read once and written once,
// float32 where it lies, other types by way of a block that stays in L1.
#include "../core/isa_name.h"
#include "../core/tensor_stream.h"
#include "kernel.h"

namespace {

using namespace fastvlp;

template <bool kFromSource>
void ema_loop(float* __restrict momentum, const float* __restrict source, int n, float weight) {
  for (int i = 0; i < n; ++i) momentum[i] = ema(momentum[i], source[i], {weight, kFromSource});
}

void ema_block(float* momentum, const float* source, int n, EmaWeights w) {
  (w.from_source ? ema_loop<true> : ema_loop<false>)(momentum, source, n, w.weight);
}

void adamw_block(float* __restrict weight, const float* __restrict gradient,
                 float* __restrict first, float* __restrict second, int n, const AdamWFactors& f) {
  for (int i = 0; i < n; ++i) adamw(gradient[i], weight[i], first[i], second[i], f);
}

void run_ema(const TableEntry& entry, const Geometry* geometry, int64_t begin, int64_t end,
             EmaWeights w) {
  Block momentum(entry, geometry, kMomentum), source(entry, geometry, kSource),
      copy(entry, geometry, kMomentumCopy);
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    float* m = momentum.load(at, n);
    ema_block(m, source.load(at, n), n, w);
    momentum.store(at, n, m);
    copy.stream(at, n, m);
  }
  finish_streams();
}

void run_adamw(const TableEntry& entry, const Geometry* geometry, int64_t begin, int64_t end,
               const AdamWFactors& f, EmaWeights w) {
  Block weight(entry, geometry, kWeight), gradient(entry, geometry, kGradient),
      first(entry, geometry, kFirst), second(entry, geometry, kSecond),
      momentum(entry, geometry, kWeightMomentum), weight_copy(entry, geometry, kWeightCopy),
      momentum_copy(entry, geometry, kWeightMomentumCopy);
  for (int64_t at = begin; at < end; at += kBlock) {
    const int n = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    float *p = weight.load(at, n), *m = first.load(at, n), *v = second.load(at, n);
    adamw_block(p, gradient.load(at, n), m, v, n, f);
    first.store(at, n, m);
    second.store(at, n, v);
    weight.store(at, n, p);
    weight_copy.stream(at, n, p);
    if (!momentum.present()) continue;
    float* e = momentum.load(at, n);
    ema_block(e, p, n, w);
    momentum.store(at, n, e);
    momentum_copy.stream(at, n, e);
  }
  finish_streams();
}

bool run_exceeds(const TableEntry& entry, const Geometry* geometry, int64_t begin, int64_t end,
                 float limit) {
  Block values(entry, geometry, 0);
  int found = 0;
  for (int64_t at = begin; at < end && found == 0; at += kBlock) {
    const int n = static_cast<int>(end - at < kBlock ? end - at : kBlock);
    const float* v = values.load(at, n);
    for (int i = 0; i < n; ++i) found |= exceeds(v[i], limit);
  }
  return found != 0;
}

}  // namespace

namespace fastvlp {

const EmaKernels& FASTVLP_JOIN(ema_kernels_, FASTVLP_ISA)() {
  static const EmaKernels kernels = {run_ema, run_adamw, run_exceeds};
  return kernels;
}

}  // namespace fastvlp
