// A counter-based generator: the same numbers on every device, in any order, without a state.
#pragma once

#include <cmath>
#include <cstdint>

#include "contrastive_math.h"

namespace fastvlp {

// First word of Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011) at the counter (c0, c1, c2, 0).
FASTVLP_HD uint32_t philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2) {
  uint32_t c3 = 0, k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p2 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p2 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p2);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// A standard Gumbel variable from 32 random bits: -log(-log(1 - v)) with v in (0, 1), where log1p
// keeps the small v, the candidates that win, apart from one another.
FASTVLP_HD float gumbel(uint32_t random) {
  const float v = (static_cast<float>(random) + 0.5f) * 2.3283064365386963e-10f;  // 2^-32
  return -logf(-log1pf(-(v < 0.99999994f ? v : 0.99999994f)));
}

}  // namespace fastvlp
