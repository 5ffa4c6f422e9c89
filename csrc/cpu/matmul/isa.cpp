// The matmul kernels for one instruction set: on split tiles, and none for the sets without tiles,
// where a BLAS is as fast. Compiled once per set with FASTVLP_ISA naming it; everything
// but the one exported table has internal linkage.
#include "kernel.h"

#include "../core/isa_name.h"
#include "../gemm/bf16x3_pack.h"

namespace {

#if defined(__AMX_BF16__)

using fastvlp::MatmulTask;
using fastvlp::Matrix;

// Packed blocks of A stay in L2; a chunk of B streams from the cache behind it.
constexpr int64_t kMostSteps = 24;             // of a chunk of K
constexpr int64_t kRowWords = 256 * 1024;      // of a packed block of A
constexpr int64_t kColumnWords = 1024 * 1024;  // of a packed chunk of B

int64_t blocks_of(int64_t side) { return (side + kStepSide - 1) / kStepSide; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// K in equal chunks.
int64_t chunk_of(int64_t depth) {
  const int64_t steps = steps_of(depth), chunks = (steps + kMostSteps - 1) / kMostSteps;
  return (steps + chunks - 1) / chunks;
}

// How many blocks of 32 rows or columns are packed at a time for chunks of so many steps.
int64_t packed_blocks(int64_t side, int64_t steps, int64_t words) {
  const int64_t fit = words / (steps * kStepWords);
  return smaller(blocks_of(side), fit < 1 ? 1 : fit);
}

// Rows of A or columns of B, `side` of them, and their `depth` floats along K.
struct Side {
  const float* data;
  int64_t stride;  // from one row of A or column of B to the next
  int64_t along;   // from one of K to the next
  int64_t count, depth;
};

void pack(Operand operand, const Side& x, float alpha, uint32_t* out) {
  if (x.along == 1) {
    const Features sides = {x.data, x.count, x.stride, Element::kFloat32};
    split_along_dim(operand, sides, 0, x.count, x.depth, alpha, out);
  } else {
    const Features rows_of_k = {x.data, x.depth, x.along, Element::kFloat32};
    split_along_rows(operand, rows_of_k, 0, x.depth, x.count, alpha, out);
  }
}

// A block at the edge of C or one that is added to it, by way of `square`, 32 x 32.
// One running sum over all of K would round worse than a BLAS; sums of chunks do not.
void multiply_block_apart(const uint32_t* a, const uint32_t* b, int64_t steps, const float* bias,
                          float* c, int64_t c_row, int64_t rows, int64_t cols, bool added,
                          float* square) {
  const auto run = rows <= kTile   ? cols <= kTile ? split_block<1, 1> : split_block<1, 2>
                   : cols <= kTile ? split_block<2, 1>
                                   : split_block<2, 2>;
  run(a, b, steps, bias, square, kStepSide);
  compiler_barrier(square);
  for (int64_t r = 0; r < rows; ++r, c += c_row, square += kStepSide)
    for (int64_t j = 0; j < cols; j += kLanes) {
      const __mmask16 lanes = first_lanes(cols - j);
      __m512 v = _mm512_load_ps(square + j);
      if (added) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(lanes, c + j));
      _mm512_mask_storeu_ps(c + j, lanes, v);
    }
}

struct Scratch {
  uint32_t* a;
  uint32_t* b;
  float* bias;    // of the columns of one chunk, padded
  float* square;  // 32 x 32
};

// Rows [row, row + rows) and columns [col, col + cols) of C by packed steps.
void multiply_chunk(const MatmulTask& t, const Scratch& s, int64_t row, int64_t rows, int64_t col,
                    int64_t cols, int64_t steps, bool first) {
  const bool biased = first && t.bias != nullptr, added = !first || t.accumulate;
  for (int64_t j = 0; j < cols; j += kStepSide)
    for (int64_t i = 0; i < rows; i += kStepSide) {
      const uint32_t* a = s.a + i / kStepSide * steps * kStepWords;
      const uint32_t* b = s.b + j / kStepSide * steps * kStepWords;
      const float* bias = biased ? s.bias + j : nullptr;
      float* c = t.c + (row + i) * t.c_row + col + j;
      if (!added && rows - i >= kStepSide && cols - j >= kStepSide)
        split_block<2, 2>(a, b, steps, bias, c, t.c_row);
      else
        multiply_block_apart(a, b, steps, bias, c, t.c_row, smaller(rows - i, kStepSide),
                             smaller(cols - j, kStepSide), added, s.square);
    }
}

int64_t scratch_floats(int64_t m, int64_t n, int64_t k) {
  const int64_t steps = chunk_of(k);
  const int64_t blocks = packed_blocks(m, steps, kRowWords) + packed_blocks(n, steps, kColumnWords);
  return blocks * steps * kStepWords + blocks_of(n) * kStepSide + kStepSide * kStepSide;
}

void multiply(const MatmulTask& t, float* scratch) {
  const int64_t most = chunk_of(t.k);
  const int64_t rows = packed_blocks(t.m, most, kRowWords) * kStepSide;
  const int64_t cols = packed_blocks(t.n, most, kColumnWords) * kStepSide;
  Scratch s;
  s.square = scratch;
  s.bias = s.square + kStepSide * kStepSide;
  s.a = reinterpret_cast<uint32_t*>(s.bias + blocks_of(t.n) * kStepSide);
  s.b = s.a + rows * most * kStepWords / kStepSide;
  const TileSession session;
  for (int64_t col = 0; col < t.n; col += cols) {
    const int64_t width = smaller(cols, t.n - col);
    if (t.bias != nullptr) std::memcpy(s.bias, t.bias + col, width * 4);
    for (int64_t step = 0; step < steps_of(t.k); step += most) {
      const int64_t steps = smaller(most, steps_of(t.k) - step), k = step * kStepDepth;
      const int64_t depth = smaller(steps * kStepDepth, t.k - k);
      pack(Operand::kB, {t.b.data + k * t.b.row + col * t.b.col, t.b.col, t.b.row, width, depth},
           t.alpha, s.b);
      for (int64_t row = 0; row < t.m; row += rows) {
        const int64_t height = smaller(rows, t.m - row);
        pack(Operand::kA, {t.a.data + row * t.a.row + k * t.a.col, t.a.row, t.a.col, height, depth},
             1.0f, s.a);
        compiler_barrier(s.a);
        multiply_chunk(t, s, row, height, col, width, steps, step == 0);
        compiler_barrier(t.c);
      }
    }
  }
}

#endif

}  // namespace

namespace fastvlp {

const MatmulKernels& FASTVLP_JOIN(matmul_kernels_, FASTVLP_ISA)() {
#if defined(__AMX_BF16__)
  static constexpr MatmulKernels table = {scratch_floats, multiply};
#else
  static constexpr MatmulKernels table = {nullptr, nullptr};
#endif
  return table;
}

}  // namespace fastvlp
