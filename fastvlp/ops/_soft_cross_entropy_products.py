"""The products of soft cross entropy, on blocks that bound the memory of what is in between.

Logits and their gradients are kept in the dtype of the products: on a CPU bfloat16 where the
processor multiplies it, else float32, to which weights are then converted a block of the
vocabulary at a time. On a GPU logits are float32 and gradients are in the weights' dtype.
"""

from collections.abc import Iterator

import torch

# Rows of the vocabulary converted at once: 12 MB at a width of 768.
_CONVERTED_ROWS = 4096
# Row starts of the logits are multiples of this many bytes.
_ALIGNED_BYTES = 64

# A number on a CPU, a tensor on a GPU, where looking at it would stall the stream.
Factor = float | torch.Tensor


def products_dtype(x: torch.Tensor) -> torch.dtype:
    """In which dtype products of x are made, and gradients of logits kept."""
    if x.is_cuda or x.dtype == torch.float32:
        return x.dtype
    return x.dtype if x.dtype == torch.bfloat16 and _multiplies_bf16() else torch.float32


@torch.compiler.assume_constant_result
def _multiplies_bf16() -> bool:
    return torch.ops.fastvlp.cpu_instruction_set() == "avx512_bf16"


def storage_factor(dtype: torch.dtype) -> float:
    """What kept gradients are multiplied by: float16 would lose small ones to underflow."""
    return 2.0**14 if dtype == torch.float16 else 1.0


def row_length(cols: int, dtype: torch.dtype) -> int:
    """Elements from one row of kept gradients to the next."""
    step = _ALIGNED_BYTES // dtype.itemsize
    return -(-cols // step) * step


def matrix(storage: torch.Tensor, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, cols] with aligned rows, over the beginning of contiguous float32 storage."""
    length = row_length(cols, dtype)
    return storage.view(dtype)[: rows * length].view(rows, length)[:, :cols]


def logits(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out [M, V] = hidden [M, D] @ weight [V, D].T, out in float32 or the products' dtype."""
    if out.dtype != hidden.dtype and out.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
        return
    hidden = hidden.to(out.dtype)
    for block, converted in _blocks(weight, out.dtype):
        torch.mm(hidden, converted.T, out=out[:, block])


def hidden_gradient(gradient: torch.Tensor, weight: torch.Tensor, factor: Factor) -> torch.Tensor:
    """factor * gradient [M, V] @ weight [V, D], in float32 or, in one rounding, weight's dtype."""
    if gradient.is_cuda:
        return _product_on_cuda(gradient, weight).mul_(factor)
    out = gradient.new_empty(gradient.shape[0], weight.shape[1])
    for block, converted in _blocks(weight, gradient.dtype):
        beta = 1 if block.start else 0
        torch.addmm(out, gradient[:, block], converted, beta=beta, alpha=factor, out=out)
    return out


def weight_gradient(
    gradient: torch.Tensor, hidden: torch.Tensor, factor: Factor, dtype: torch.dtype
) -> torch.Tensor:
    """factor * gradient [M, V].T @ hidden [M, D], in `dtype`, rounded once."""
    if gradient.is_cuda:
        return _product_on_cuda(gradient.T, hidden).mul_(factor).to(dtype)
    hidden = hidden.to(gradient.dtype)
    out = hidden.new_empty(gradient.shape[1], hidden.shape[1], dtype=dtype)
    if out.dtype == gradient.dtype:
        return torch.addmm(out, gradient.T, hidden, beta=0, alpha=factor, out=out)
    for block in _slices(len(out)):
        part = hidden.new_empty(block.stop - block.start, hidden.shape[1])
        out[block] = torch.addmm(part, gradient[:, block].T, hidden, beta=0, alpha=factor, out=part)
    return out


def bias_gradient(gradient: torch.Tensor, row_weights: torch.Tensor) -> torch.Tensor:
    """row_weights [M] fp32 @ gradient [M, V] in fp32."""
    if not gradient.is_cuda:
        return torch.ops.fastvlp.soft_cross_entropy_column_sums(gradient, row_weights)
    return _product_on_cuda(gradient.T, row_weights[:, None].to(gradient.dtype)).squeeze(1)


def _product_on_cuda(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32)


def _slices(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _CONVERTED_ROWS):
        yield slice(start, min(rows, start + _CONVERTED_ROWS))


def _blocks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The weights in `dtype`: whole where they are of it, else converted block by block."""
    if weight.dtype == dtype:
        yield slice(0, len(weight)), weight
        return
    for block in _slices(len(weight)):
        yield block, weight[block].to(dtype)
