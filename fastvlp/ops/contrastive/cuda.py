"""The contrastive losses on CUDA tensors by the compiled passes (csrc/cuda) and torch.mm.

The logits are walked in chunks: torch.mm makes the fp32 similarities x y^T of a chunk, one pass of
ours reads them, and for gradients two more GEMMs follow, summed in fp32 over the chunks. Nothing is
read back to the host. float32 GEMMs honour torch.backends.cuda.matmul.allow_tf32.

Range: logit gradients are stored divided by the largest |weight|, hence within [-2, 2] whatever
the batch size and the upstream gradient, and in float16 times 2**14 besides, so that a probability
of 4e-9 is still a normal number. Both factors return in fp32, after the GEMMs.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch

from ..._tracing import constant_result
from ...kernels import align, storage_factor
from .. import compiled
from .._core.gpu_plan import TILE

# Bytes of similarities that the statistics make at once: the pass over them finds them in the L2
# cache, 40 MB on the smallest GPU the default build is for.
_STATISTICS_BYTES = 32 << 20


@constant_result
def unavailable(device: int) -> tuple[str, ...]:
    """Why the compiled CUDA passes do not run on the CUDA device of this index (empty: they do)."""
    return _unavailable(device)


@cache
def _unavailable(device: int) -> tuple[str, ...]:
    if reasons := compiled.load_cuda():
        return reasons
    reason = torch.ops.fastvlp.cuda_kernels_unavailable(device)
    return (f"the compiled kernels do not run on cuda:{device}: {reason}",) if reason else ()


def statistics(x, y, scale, kept, offset, rows, cols, *_):
    """fastvlp::contrastive_statistics; the blocks are for the CPU, and nothing is kept."""
    m, n = x.shape[0], y.shape[0]
    row_negatives = torch.empty(m if rows else 0, dtype=torch.float64, device=x.device)
    positive = _floats(x, m)
    col_pairs = _floats(x, 2, n if cols else 0)
    col_pairs[0].fill_(-torch.inf)
    col_pairs[1].zero_()
    if n == 0:
        row_negatives.fill_(-torch.inf)
        positive.zero_()
    height = max(1, _STATISTICS_BYTES // (4 * max(n, 1)))
    for chunk, _, similarities in _similarities(x, y, height, n):
        torch.ops.fastvlp.contrastive_cuda_statistics(
            similarities, scale, offset + chunk.start, row_negatives[chunk], positive[chunk],
            col_pairs,
        )  # fmt: skip
    reference, total = col_pairs.double()
    return row_negatives, reference + total.log(), positive


def gradients(
    x, y, scale, row_lse, col_lse, positive_gradient, weights, kept, offset,
    block_rows, block_cols, keep_blocks, chunk_rows, chunk_cols,
):  # fmt: skip
    """fastvlp::contrastive_gradients, in chunks of the plan's size."""
    largest = weights.abs().amax()
    stored = storage_factor(x.dtype)
    # All weights 0 means gradients of 0, not 0 / 0.
    unit = torch.where(largest == 0, 1, largest) / stored
    relative, positives = weights / unit, positive_gradient / unit

    def logit_gradient(similarities, rows, cols, out):
        torch.ops.fastvlp.contrastive_cuda_gradient(
            similarities, scale, row_lse[rows], col_lse[cols], positives[rows], relative,
            offset + rows.start - cols.start, out,
        )  # fmt: skip

    size = _chunk(x, block_rows * chunk_rows, block_cols * chunk_cols)
    return _feature_gradients(x, y, scale, largest / stored, size, logit_gradient)


def sigmoid(
    x, y, scale, bias, weight, offset, gradients, block_rows, block_cols, chunk_rows, chunk_cols
):
    """fastvlp::contrastive_sigmoid, in chunks of the plan's size."""
    sums = torch.zeros(2, dtype=torch.float64, device=x.device)
    stored = storage_factor(x.dtype)

    def logit_gradient(similarities, rows, cols, out):
        torch.ops.fastvlp.contrastive_cuda_sigmoid(
            similarities, scale, bias, stored, offset + rows.start - cols.start, sums, out
        )

    size = _chunk(x, block_rows * chunk_rows, block_cols * chunk_cols)
    if gradients:
        factor = _floats(x).fill_(weight / stored)
        dx, dy, dscale = _feature_gradients(x, y, scale, factor, size, logit_gradient)
    else:
        for rows, cols, similarities in _similarities(x, y, *size):
            logit_gradient(similarities, rows, cols, _floats(x, 0))
        dx, dy = x.new_empty(0, x.shape[1]), y.new_empty(0, y.shape[1])
        dscale = _floats(x).zero_()
    loss, dbias = (sums * weight).float().unbind()
    return loss.clone(), dx, dy, dscale, dbias.clone()


def _feature_gradients(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    factor: torch.Tensor,
    size: tuple[int, int],
    logit_gradient: Callable[[torch.Tensor, slice, slice, torch.Tensor], None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients w.r.t. x, y and the scale; logit gradients are `factor` times what is written.

    `similarities` are the logits of a chunk without their scale; `logit_gradient(similarities,
    rows, cols, out)` writes its logit gradients to `out`, in x's dtype.
    """
    (m, dim), n = x.shape, y.shape[0]
    dx, y_sums = x.new_empty(m, dim), _floats(y, n, dim)
    if m == 0:
        y_sums.zero_()
    scale_sum = torch.zeros((), dtype=torch.float64, device=x.device)
    # float32 logit gradients take the place of the similarities, float32 sums that of dx.
    in_place = x.dtype == torch.float32
    own = None if in_place else _workspace(x, min(size[0], m), min(size[1], n), x.dtype)
    x_sums = _floats(x, 0 if in_place else min(size[0], m), dim)
    for rows, cols, similarities in _similarities(x, y, *size):
        g = similarities if in_place else own[: similarities.shape[0], : similarities.shape[1]]
        logit_gradient(similarities, rows, cols, g)
        x_part = dx[rows] if in_place else x_sums[: similarities.shape[0]]
        _multiply(g, y[cols], x_part, add=cols.start > 0)
        _multiply(g.T, x[rows], y_sums[cols], add=rows.start > 0)
        if cols.stop == n:
            # dX = scale * G y, and <x, G y> = <G, x y^T> is the derivative w.r.t. the scale.
            scale_sum += (x[rows] * x_part).sum(dtype=torch.float64)
            torch.mul(x_part, scale * factor, out=dx[rows])
    if n == 0:
        dx.zero_()
    dy = y_sums.mul_(scale * factor).to(y.dtype)
    return dx, dy, (scale_sum * factor).float()


def _similarities(
    x: torch.Tensor, y: torch.Tensor, height: int, width: int
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """x y^T in fp32 by chunks, row chunks outside: its rows, its columns, and the values, which the
    next chunk overwrites."""
    space = _workspace(x, min(height, x.shape[0]), min(width, y.shape[0]), torch.float32)
    for rows in _slices(x.shape[0], height):
        for cols in _slices(y.shape[0], width):
            values = space[: rows.stop - rows.start, : cols.stop - cols.start]
            _multiply(x[rows], y[cols].T, values, add=False)
            yield rows, cols, values


def _slices(length: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, length)) for at in range(0, length, max(step, 1))]


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, add: bool) -> None:
    """a @ b into the fp32 `out`, or added to it; half-precision sums come back unrounded."""
    precision = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
    if add:
        torch.addmm(out, a, b, out=out, **precision)
    else:
        torch.mm(a, b, out=out, **precision)


def _chunk(x: torch.Tensor, rows: int, cols: int) -> tuple[int, int]:
    # The plan counts a logit's gradient; half-precision ones come on top of fp32 similarities here.
    if x.dtype == torch.float32:
        return rows, cols
    fitting = rows * x.element_size() // (4 + x.element_size())
    return max(1, fitting - fitting % min(TILE, max(fitting, 1))), cols


def _floats(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _workspace(like: torch.Tensor, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    # Whole vectors of a half-precision dtype, as the matrix units want them.
    return torch.empty((rows, align(cols)), dtype=dtype, device=like.device)[:, :cols]
