// The schema of every operator, in one place.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastvlp, m) {
  // x [M, D], y [N, D], scale [] fp32. Returns row_lse [M], col_lse [N] (each [0] where not asked
  // for), positive [M], and the kept logits tiles (opaque, [0] where nothing is kept).
  m.def(
      "contrastive_statistics(Tensor x, Tensor y, Tensor scale, int offset, bool rows, bool cols, "
      "int block_rows, int block_cols, int keep_blocks) -> (Tensor, Tensor, Tensor, Tensor)");
  // weights [3] fp32: of the row softmax, of the column softmax, of the positive. Returns dx [M, D]
  // and dy [N, D] in the features' dtype, and the derivative by the scale, [] fp32.
  m.def(
      "contrastive_gradients(Tensor x, Tensor y, Tensor scale, Tensor row_lse, Tensor col_lse, "
      "Tensor weights, Tensor kept, int offset, int block_rows, int block_cols, int keep_blocks, "
      "int chunk_rows, int chunk_cols) -> (Tensor, Tensor, Tensor)");
  // Sigmoid loss times `weight` and, where wanted, its gradients (else empty): loss [], dx [M, D],
  // dy [N, D], derivative by the scale [], by the bias [].
  m.def(
      "contrastive_sigmoid(Tensor x, Tensor y, Tensor scale, Tensor bias, float weight, "
      "int offset, bool gradients, int block_rows, int block_cols, int chunk_rows, "
      "int chunk_cols) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The instruction sets compiled in that this processor runs, fastest first, comma-separated.
  m.def("cpu_instruction_sets() -> str");
}
