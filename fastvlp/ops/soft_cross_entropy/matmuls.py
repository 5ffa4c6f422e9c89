"""The matmuls of soft cross entropy, on blocks that bound the memory of what is in between.

Logits and their gradients are kept in the dtype of the matmuls: on a CPU bfloat16 where it
has instructions for it, else float32, to which weights are then converted a block of the
vocabulary at a time. On a GPU logits are float32 and gradients are in the weights' dtype.
"""

from collections.abc import Iterator

import torch

from ..._tracing import constant_result
from ..matmul.api import one_unit_stride, runs_natively

# Rows of the vocabulary in one matmul, and in one whose weights or result are converted.
_BLOCK, _CONVERTED_BLOCK = 4096, 2048
# Rows of hidden states in one bfloat16 matmul with all of the vocabulary (bench/NOTES.md).
_LOW_ROWS = 512
# So few rows make matmuls that do little else than read or write the vocabulary, for which a kernel
# is faster (kFewRows of csrc/cpu/soft_cross_entropy/kernel.h) and conversions take longest.
FEW_ROWS = 32
# Sums over rows that make up a gradient with respect to the bias on a GPU.
_SUMS = 16
# Row starts of the logits are multiples of this many bytes.
_ALIGNED_BYTES = 64

# A number on a CPU, a tensor on a GPU, where looking at it would stall the stream.
Factor = float | torch.Tensor


def on_gpu(x: torch.Tensor) -> bool:
    """Whether matmuls of x run on a GPU."""
    return x.is_cuda


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """In which dtype matmuls of x are computed, and gradients of logits kept."""
    if on_gpu(x) or x.dtype == torch.float32:
        return x.dtype
    return x.dtype if x.dtype == torch.bfloat16 and _multiplies_bf16() else torch.float32


def logits_dtype(x: torch.Tensor) -> torch.dtype:
    """In which dtype logits of x are made: on a GPU they are wider than their gradients."""
    return torch.float32 if on_gpu(x) else matmul_dtype(x)


def in_few_rows(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`hidden` [M, D] in the dtype of weights that would take longer to convert than to read."""
    if on_gpu(hidden) or hidden.dtype.itemsize >= weight.dtype.itemsize:
        return hidden
    return hidden.to(weight.dtype) if hidden.shape[0] <= FEW_ROWS else hidden


@constant_result
def _multiplies_bf16() -> bool:
    return torch.ops.fastvlp.cpu_instruction_set() in ("avx512_bf16", "amx")


def row_length(cols: int, dtype: torch.dtype) -> int:
    """Elements from one row of kept gradients to the next."""
    step = _ALIGNED_BYTES // dtype.itemsize
    return -(-cols // step) * step


def matrix(storage: torch.Tensor, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, cols] with aligned rows, over the beginning of contiguous float32 storage."""
    length = row_length(cols, dtype)
    values = storage if dtype == storage.dtype else storage.view(dtype)
    start, strides = values.storage_offset(), (length, 1)
    if dtype != torch.float32 and cols < length:
        # A bfloat16 matmul along an odd number of columns reads one more and multiplies it by 0.
        values.as_strided((rows, length - cols), strides, start + cols).zero_()
    return values.as_strided((rows, cols), strides, start)


def logits(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out [M, V] = hidden [M, D] @ weight [V, D].T, out in float32 or the matmuls' dtype."""
    if on_gpu(out):
        wider = {} if out.dtype == hidden.dtype else {"out_dtype": out.dtype}
        torch.mm(hidden, weight.T, out=out, **wider)
        return
    hidden = hidden.to(out.dtype)
    step = _BLOCK if weight.dtype == out.dtype else _CONVERTED_BLOCK
    if len(weight) <= step or (weight.dtype == out.dtype and len(hidden) <= FEW_ROWS):
        _multiply(hidden, weight.to(out.dtype).T, out, 1.0, False)
        return
    for block in _slices(len(weight), step):
        _multiply(hidden, weight[block].to(out.dtype).T, out[:, block], 1.0, False)


def hidden_gradient(gradient: torch.Tensor, weight: torch.Tensor, factor: Factor) -> torch.Tensor:
    """factor * gradient [M, V] @ weight [V, D], in the gradient's dtype or float32."""
    if on_gpu(gradient):
        return _cuda_matmul(gradient, weight).mul_(factor)
    if weight.dtype != gradient.dtype:
        return _converted_matmul(gradient, weight).mul_(factor)
    rows = len(gradient)
    if runs_natively(gradient, weight):
        out = gradient.new_empty(rows, weight.shape[1])
        _multiply(gradient, weight, out, factor, False)
        return out
    # Zeros, not empty: a factor of 0 before the old value does not silence NaN in every matmul.
    out = gradient.new_zeros(rows, weight.shape[1])
    for part in _slices(rows, _LOW_ROWS if gradient.dtype == torch.bfloat16 else rows):
        out[part].addmm_(gradient[part], weight, beta=0, alpha=factor)
    return out


def _converted_matmul(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    # A converted copy of all weights would be as large as the derivatives of many rows.
    total = gradient.new_zeros((len(gradient), weight.shape[1]), dtype=torch.float32)
    for block in _slices(len(weight), _CONVERTED_BLOCK):
        total += torch.mm(gradient[:, block], weight[block].to(gradient.dtype))
    return total


def weight_gradient(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    factor: Factor,
    dtype: torch.dtype,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """factor * gradient [M, V].T @ hidden [M, D], in `dtype`, rounded once, or added to `total`."""
    if on_gpu(gradient):
        found = _cuda_matmul(gradient.T, hidden)
        if total is not None:
            return total.add_(found.mul_(factor))
        # Multiplied and rounded in one pass over it.
        out = found if found.dtype == dtype else torch.empty_like(found, dtype=dtype)
        return torch.mul(found, factor, out=out)
    hidden = hidden.to(gradient.dtype)
    first = total is None
    if first:
        # Of many rows only zeros, the gradient of none of them: fresh pages are cheaper to touch in
        # order than in the midst of a matmul.
        is_few = len(gradient) <= FEW_ROWS
        rows = slice(None if is_few else 0)
        total = torch.ops.fastvlp.soft_cross_entropy_weight_gradient(
            gradient[rows], hidden[rows], hidden.new_empty(0, dtype=dtype), factor
        )
        if is_few:
            return total
    if total.dtype == gradient.dtype:
        _multiply(gradient.T, hidden, total, factor, not first)
        return total
    for block in _slices(len(total), _CONVERTED_BLOCK // 2):  # memory is at its highest here
        part = hidden.new_zeros(block.stop - block.start, hidden.shape[1])
        part.addmm_(gradient[:, block].T, hidden, beta=0, alpha=factor)
        if first:
            total[block] = part
        else:
            total[block] += part
    return total


def bias_gradient(
    gradient: torch.Tensor,
    row_weights: torch.Tensor,
    factor: Factor,
    relative: torch.Tensor | None,
) -> torch.Tensor:
    """row_weights [M] fp32 @ gradient [M, V] in fp32; the weights are factor * relative."""
    if not on_gpu(gradient):
        return torch.ops.fastvlp.soft_cross_entropy_column_sums(gradient, row_weights)
    # The factor comes after the matmul: float16 would lose a weight of one in many rows.
    parts = _cuda_matmul(gradient.T, _in_columns(relative).to(gradient.dtype))
    return parts.sum(1).mul_(factor)


def _in_columns(weights: torch.Tensor) -> torch.Tensor:
    """[M] -> [M, 16], a sixteenth of the rows in each column: a matmul with it has short sums.

    One sum over thousands of rows would lose digits of float32 that a tree of sums keeps.
    """
    rows = torch.arange(len(weights), device=weights.device)
    columns = torch.arange(_SUMS, device=weights.device)
    own = (rows * _SUMS // max(len(weights), 1))[:, None] == columns
    return torch.where(own, weights[:, None], 0)


def _multiply(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, factor: float, add: bool
) -> None:
    """out = factor * a b, or that added to it, on a CPU."""
    if runs_natively(a, b):
        a, b = one_unit_stride(a), one_unit_stride(b)
        torch.ops.fastvlp.add_matmul(a, b, float(factor), add, out)
    else:
        out.addmm_(a, b, beta=1 if add else 0, alpha=factor)


def _cuda_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32)


def _slices(count: int, step: int) -> Iterator[slice]:
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))
