// The schema of every operator, in one place.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastvlp, m) {
  // x [M, D], y [N, D], scale [] fp32. Returns row_lse [M], col_lse [N] (each [0] where not asked
  // for) and positive [M]; writes the tiles of the first keep_blocks row blocks to `kept` (opaque,
  // fp32, [0] where nothing is kept).
  m.def(
      "contrastive_statistics(Tensor x, Tensor y, Tensor scale, Tensor(a!) kept, int offset, "
      "bool rows, bool cols, int block_rows, int block_cols, int keep_blocks) -> "
      "(Tensor, Tensor, Tensor)");
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
  // The passes over a chunk of fp32 products <x_i, y_j> [M, N] in device memory, with unit stride
  // along N; the logit is z = scale * product (+ bias), the positive of row i is column i + offset.
  // Log-sum-exp of each row (row_lse [M], or [0] where not wanted), the positive logits [M] (0
  // where the chunk has none), and the (max, sum of exp(z - max)) of each column, merged into
  // col_pairs [2, N] ([2, 0] where not wanted), which starts as (-inf, 0).
  m.def(
      "contrastive_cuda_statistics(Tensor products, Tensor scale, int offset, "
      "Tensor(a!) row_lse, Tensor(b!) positive, Tensor(c!) col_pairs) -> ()");
  // out [M, N] (fp32, bf16 or fp16; fp32 may be the products themselves) = weights[0] * exp(z -
  // row_lse) + weights[1] * exp(z - col_lse) - weights[2] at the positive. A log-sum-exp of no
  // elements leaves its term out.
  m.def(
      "contrastive_cuda_gradient(Tensor products, Tensor scale, Tensor row_lse, Tensor col_lse, "
      "Tensor weights, int offset, Tensor(a!) out) -> ()");
  // Adds to sums [2] fp64 the sum of -log sigmoid(+-z) and of its derivative by z, and writes
  // factor * derivative to out [M, N] (as above; [0] where not wanted).
  m.def(
      "contrastive_cuda_sigmoid(Tensor products, Tensor scale, Tensor bias, float factor, "
      "int offset, Tensor(a!) sums, Tensor(b!) out) -> ()");
  // Why the CUDA kernels do not run on this device; empty where they do.
  m.def("cuda_kernels_unavailable(int device) -> str");
  // Frees the buffers that the CPU kernels keep between calls.
  m.def("release_cpu_buffers() -> ()");
  // The instruction sets compiled in that this processor runs, fastest first, comma-separated.
  m.def("cpu_instruction_sets() -> str");
  // Both directions of the loss of student rows image, text [B, D] against the other modality's
  // momentum rows and the first queue_length rows of its queue [Q, D]. ids [B] and queue_ids [Q]
  // int64, or [0] where only a row's own pair is positive; temperature and alpha [] fp32; seed []
  // int64. `teacher` false says that alpha is 0. Returns the loss [] fp32, the gradients by image,
  // text [B, D] (or [0, D]) and temperature, and per image a text and per text an image that is a
  // hard negative, int64 [B] (or [0]), -1 where there is none.
  m.def(
      "momentum_contrastive(Tensor image, Tensor text, Tensor image_momentum, "
      "Tensor text_momentum, Tensor image_queue, Tensor text_queue, Tensor ids, Tensor queue_ids, "
      "Tensor queue_length, Tensor temperature, Tensor alpha, Tensor seed, bool teacher, "
      "bool gradients, bool negatives, int group_rows, int block_keys) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
