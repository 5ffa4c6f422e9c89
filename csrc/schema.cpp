// The schema of every operator, in one place.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastvlp, m) {
  // x [M, D], y [N, D], scale [] fp32; the positive of row i is column i + offset. Returns the
  // log-sum-exps of the rows' and of the columns' logits, the positives' left out, [M] and [N] fp64
  // (each [0] where not asked for), and the positives' logits [M] (0 where they have no column
  // here); writes the tiles of the first keep_blocks row blocks to `kept` (opaque, fp32, [0] where
  // nothing is kept).
  m.def(
      "contrastive_statistics(Tensor x, Tensor y, Tensor scale, Tensor(a!) kept, int offset, "
      "bool rows, bool cols, int block_rows, int block_cols, int keep_blocks) -> "
      "(Tensor, Tensor, Tensor)");
  // row_lse [M] and col_lse [N] fp64 of all logits ([0]: a direction without a loss), weights [2]
  // fp32 of the row softmax and of the column softmax, positive_gradient [M] fp32 of the positives'
  // logits. Returns dx [M, D] and dy [N, D] in the features' dtype, and the derivative with respect
  // to the scale, [] fp32.
  m.def(
      "contrastive_gradients(Tensor x, Tensor y, Tensor scale, Tensor row_lse, Tensor col_lse, "
      "Tensor positive_gradient, Tensor weights, Tensor kept, int offset, int block_rows, "
      "int block_cols, int keep_blocks, int chunk_rows, int chunk_cols) -> (Tensor, Tensor, "
      "Tensor)");
  // The loss of the pairs (x_i, y_i) on a CPU, [] fp32: the mean over them, and over the directions
  // that are asked for (rows, cols: at least one). Then what its gradients need, fp64
  // [directions + 1, N]: the log-sum-exps of each direction's negatives, and the positives' logits.
  m.def(
      "contrastive_loss(Tensor x, Tensor y, Tensor scale, Tensor(a!) kept, bool rows, bool cols, "
      "int block_rows, int block_cols, int keep_blocks) -> (Tensor, Tensor)");
  // dx, dy and the derivative with respect to the scale, for `upstream` [] fp32.
  m.def(
      "contrastive_loss_gradients(Tensor x, Tensor y, Tensor scale, Tensor statistics, "
      "Tensor upstream, Tensor kept, bool rows, bool cols, int block_rows, int block_cols, "
      "int keep_blocks, int chunk_rows, int chunk_cols) -> (Tensor, Tensor, Tensor)");
  // Sigmoid loss times `weight` and, where wanted, its gradients (else empty): loss [], dx [M, D],
  // dy [N, D], derivatives with respect to the scale [] and the bias [].
  m.def(
      "contrastive_sigmoid(Tensor x, Tensor y, Tensor scale, Tensor bias, float weight, "
      "int offset, bool gradients, int block_rows, int block_cols, int chunk_rows, "
      "int chunk_cols) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The passes over a chunk of fp32 similarities <x_i, y_j> [M, N] in device memory, with unit
  // stride along N; the logit is z = scale * similarity (+ bias), the positive of row i is column i
  // + offset. Log-sum-exp of each row's negatives (row_negatives [M] fp64, [0] where not wanted),
  // the positive logits [M] (0 where the chunk has none), and the (max, sum of exp(z - max)) of
  // each column's negatives, merged into col_pairs [2, N] ([2, 0] where not wanted), which starts
  // as (-inf, 0).
  m.def(
      "contrastive_cuda_statistics(Tensor similarities, Tensor scale, int offset, "
      "Tensor(a!) row_negatives, Tensor(b!) positive, Tensor(c!) col_pairs) -> ()");
  // out [M, N] (fp32, bf16 or fp16; fp32 may be the similarities themselves) = positive_gradient
  // [M] at the positives, elsewhere weights[0] * exp(z - row_lse) + weights[1] * exp(z - col_lse),
  // the log-sum-exps fp64 [M] and [N]. One of no elements leaves its term out.
  m.def(
      "contrastive_cuda_gradient(Tensor similarities, Tensor scale, Tensor row_lse, Tensor "
      "col_lse, "
      "Tensor positive_gradient, Tensor weights, int offset, Tensor(a!) out) -> ()");
  // Adds to sums [2] fp64 the sum of -log sigmoid(+-z) and of its derivative with respect to z, and
  // writes factor * derivative to out [M, N] (as above; [0] where not wanted).
  m.def(
      "contrastive_cuda_sigmoid(Tensor similarities, Tensor scale, Tensor bias, float factor, "
      "int offset, Tensor(a!) sums, Tensor(b!) out) -> ()");
  // q [T, H, d]; k and v [n, L, H, d], or packed [S, H, d] with cu_seqlens_k; unit stride along d.
  // cu_seqlens [n + 1] int32 or int64; key_mask [n, L] or [S] bool, true where a key is attended;
  // seed [] int64. Returns out [T, H, d] and what the backward pass needs of the softmax, fp32
  // [2, H, T] and opaque.
  m.def(
      "cross_attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, "
      "Tensor? cu_seqlens_k, Tensor? key_mask, Tensor seed, float scale, float dropout_p, "
      "bool causal, int max_seqlen_q, int max_seqlen_k) -> (Tensor, Tensor)");
  // The gradients with respect to q, k and v, contiguous.
  m.def(
      "cross_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor statistics, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_mask, "
      "Tensor seed, float scale, float dropout_p, bool causal, int max_seqlen_q, "
      "int max_seqlen_k) -> (Tensor, Tensor, Tensor)");
  // Why the CUDA kernels do not run on this device; empty where they do.
  m.def("cuda_kernels_unavailable(int device) -> str");
  // Frees the buffers that the CPU kernels keep between calls.
  m.def("release_cpu_buffers() -> ()");
  // The instruction sets compiled in that this CPU runs, fastest first, comma-separated.
  m.def("cpu_instruction_sets() -> str");
  // The multi-tensor operators: lists of equal length (or empty where a list is optional), tensors
  // of one position alike in shape, any strides, fp32, bf16 or fp16 each. The decay is a number or
  // a tensor of one value; `nonfinite` [] int64: nothing is written unless it is -1.
  // momentum = decay * momentum + (1 - decay) * source, and the same rounded to `copies`.
  m.def(
      "ema_update(Tensor(a!)[] momentum, Tensor[] source, Tensor(b!)[] copies, "
      "Tensor? decay_tensor, float decay, Tensor? nonfinite) -> ()");
  // The same, if all tensors are on the CPU and lie where those of an earlier call of it lay, which
  // were found to be in order; else nothing. Returns whether.
  m.def(
      "ema_update_again(Tensor(a!)[] momentum, Tensor[] source, Tensor(b!)[] copies, float decay) "
      "-> bool");
  // A step of AdamW, then the momentum update with the new weights.
  m.def(
      "adamw_ema(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] first_moments, "
      "Tensor(c!)[] second_moments, Tensor(d!)[] momentum, Tensor(e!)[] weight_copies, "
      "Tensor(f!)[] momentum_copies, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, float step, bool maximize, Tensor? decay_tensor, float decay, "
      "Tensor? nonfinite) -> ()");
  // [] int64: the last position whose tensor has a NaN or a magnitude above the limit, else -1.
  m.def("last_exceeding(Tensor[] tensors, float limit) -> Tensor");
  // The one of them in use: the fastest, or the one that FASTVLP_CPU_ISA names.
  m.def("cpu_instruction_set() -> str");

  // hidden [M, D], weight [V, D], bias [V] fp32, labels [M] int64, alpha [] fp32, and the same
  // three of the teacher or none of them. Returns the rows' losses [M] fp32, 0 where the label is
  // ignore_index. With has_gradient the derivatives of the first group_rows rows with respect to
  // their logits stay in `kept` (opaque, fp32 storage); without, it has the room for the logits of
  // one group after another, of the first only unless is_uniform: the matmuls are then those that
  // run with gradients. chunk_rows rows of logits exist at a time outside of it ([0]: all).
  m.def(
      "soft_cross_entropy_losses(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
      "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor alpha, "
      "int ignore_index, Tensor(a!) kept, int group_rows, int chunk_rows, bool has_gradient, "
      "bool is_uniform) -> Tensor");
  // Gradients w.r.t. hidden, weight and bias (each [0] where not needed) of the sum of row_weights
  // [M] fp32 times the losses. `kept` as the losses left it where is_kept; it is overwritten where
  // there are more than group_rows rows.
  m.def(
      "soft_cross_entropy_gradients(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
      "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor alpha, "
      "int ignore_index, Tensor row_weights, Tensor(a!) kept, bool is_kept, int group_rows, "
      "int chunk_rows, bool[3] needed) -> (Tensor, Tensor, Tensor)");
  // Losses and, in float32, the gradients of their sum, with the gradients w.r.t. the logits of
  // group_rows rows in memory at a time.
  m.def(
      "soft_cross_entropy_losses_and_gradients(Tensor hidden, Tensor weight, Tensor? bias, "
      "Tensor labels, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
      "Tensor alpha, int ignore_index, int group_rows, int chunk_rows, bool[3] needed) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  // The pass over rows of logits [M, V] (fp32 or bf16, bias [V] not yet added, [0] where there is
  // none; the teacher's [0, 0] where there is none): losses [M], and the derivatives with respect
  // to the logits in `gradient` (the logits' dtype; may be the logits themselves; [0, 0] where not
  // wanted).
  m.def(
      "soft_cross_entropy_rows(Tensor logits, Tensor bias, Tensor teacher, Tensor teacher_bias, "
      "Tensor labels, Tensor alpha, int ignore_index, Tensor(a!) losses, Tensor(b!) gradient) -> "
      "()");
  // weights [M] fp32 times matrix [M, V] (fp32 or bf16): [V] fp32.
  m.def("soft_cross_entropy_column_sums(Tensor matrix, Tensor weights) -> Tensor");
  // factor times gradient [M, V] (fp32 or bf16) transposed times hidden [M, D], of up to 32 rows
  // (none: zeros), as [V, D] in the dtype of `like`.
  m.def(
      "soft_cross_entropy_weight_gradient(Tensor gradient, Tensor hidden, Tensor like, "
      "float factor) -> Tensor");
  // x [B, Lx, D] and y [B, Ly, D], padding masks [B, Lx] and [B, Ly] (true: left out). Returns the
  // distances [B], the plans [B, Lx, Ly] and what the gradients need of each row of x and of y:
  // [2, B, Lx] and [2, B, Ly], the factor that normalises it (0: padding) and its share, the sum
  // over its part of the plan of plan times cosine. All float32.
  m.def(
      "word_patch_alignment(Tensor x, Tensor y, Tensor x_padding, Tensor y_padding, float beta, "
      "int iterations, int inner) -> (Tensor, Tensor, Tensor, Tensor)");
  // upstream [B] fp32. Returns dx and dy in the features' dtype.
  m.def(
      "word_patch_alignment_gradients(Tensor upstream, Tensor x, Tensor y, Tensor plan, "
      "Tensor x_rows, Tensor y_rows) -> (Tensor, Tensor)");
  // Both directions of the loss of student rows image, text [B, D] against the other modality's
  // momentum rows and the first queue_length rows of its queue [Q, D]. ids [B] and queue_ids [Q]
  // int64, or [0] where only a row's own pair is positive; temperature and alpha [] fp32; seed []
  // int64. `teacher` false says that alpha is 0. Returns the loss [] fp32, the gradients with
  // respect to image, text [B, D] (or [0, D]) and temperature, and per image a text and per text an
  // image that is a hard negative, int64 [B] (or [0]), -1 where there is none.
  m.def(
      "momentum_contrastive(Tensor image, Tensor text, Tensor image_momentum, "
      "Tensor text_momentum, Tensor image_queue, Tensor text_queue, Tensor ids, Tensor queue_ids, "
      "Tensor queue_length, Tensor temperature, Tensor alpha, Tensor seed, bool teacher, "
      "bool gradients, bool negatives, int group_rows, int block_keys) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // For each of the images uint8 [h, w, 3]: some of the operations on all of it, crop, bicubic
  // resize, window, flip, more of the operations, and each value's float of `table` [3, 256] into
  // the upper left of out[i], float32 [n, 3, H, W]; 0 elsewhere. plans int64 [n, 14]: crop (left,
  // top, width, height), size (width, height), window (as the crop), flip, first operation, number
  // before the crop, number after the flip. operations float64 [m, 8]: kind, six values, fill.
  // may_start_down: as newer Pillows, which resize some images down first. Serial.
  m.def(
      "transform_images(Tensor[] images, Tensor plans, Tensor operations, Tensor table, "
      "bool may_start_down, Tensor(a!) out) -> ()");
  // a [m, k] b [k, n] + bias [n], contiguous; float32 matrices with unit stride along one dim.
  m.def("matmul(Tensor a, Tensor b, Tensor? bias) -> Tensor");
  // out [m, n] = alpha a b, added to what out holds where accumulating; unit stride along n.
  m.def("add_matmul(Tensor a, Tensor b, float alpha, bool accumulate, Tensor(a!) out) -> ()");
  // Whether the CPU's instruction set in use has these two.
  m.def("matmul_available() -> bool");
}
