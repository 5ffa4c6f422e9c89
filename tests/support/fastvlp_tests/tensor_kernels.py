"""Triton kernels with tensor descriptors, made on the host or by the kernel, on a virtual GPU.

They run under every schedule, with the same result, and no hazard may be found.
"""

import torch
import triton
import triton.language as tl
from ptx_machine.schedule import SCHEDULES
from ptx_machine.virtual_gpu import VirtualGPU
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def product_kernel(x, y, out, M, N, K, HOST: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """out = x y^T; x, y and out are descriptors, or pointers to contiguous matrices."""
    if not HOST:
        x = tl.make_tensor_descriptor(x, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
        y = tl.make_tensor_descriptor(y, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
        out = tl.make_tensor_descriptor(out, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        total = tl.dot(x.load([row, k]), y.load([col, k]).T, total)
    out.store([row, col], total.to(out.dtype))


@triton.jit
def copy_kernel(source, out):
    """A box of a source that reaches past its ends, to a matrix of boxes."""
    box = source.load([tl.program_id(0) - 1, tl.program_id(1) * 2 - 1, -4])
    out.store([tl.program_id(0), tl.program_id(1) * 2, 0], box)


def product(x, y, host: bool) -> torch.Tensor:
    """x [M, K] times y [N, K] transposed, in tiles of 64 x 64."""
    (m, k), n = x.shape, len(y)
    out = torch.full((m, n), torch.nan, dtype=x.dtype)
    given = x, y, out
    if host:
        given = [TensorDescriptor.from_tensor(t, [64, 64]) for t in given]
    with VirtualGPU(90, schedules=SCHEDULES):
        grid = triton.cdiv(m, 64), triton.cdiv(n, 64)
        product_kernel[grid](*given, m, n, k, host, 64, 64, 64)
    return out


def boxes(source, padding: str) -> torch.Tensor:
    """[4, 6, 8]: boxes [1, 2, 8] of `source` [2, 3, 8] from [-1, -1, -4] on."""
    out = torch.zeros(4, 6, 8)
    described = TensorDescriptor.from_tensor(source, [1, 2, 8], padding=padding)
    with VirtualGPU(90, schedules=SCHEDULES):
        copy_kernel[(4, 3)](described, TensorDescriptor.from_tensor(out, [1, 2, 8]))
    return out
