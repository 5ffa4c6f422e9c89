"""What a comparison of gpu_model.py is made of, and how its cases make their inputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from _gpu.launches import TorchOp

BF16 = torch.bfloat16
# What the operators ask for on a GPU of 141 GB: a twentieth of free memory, as a power of two.
WORKSPACE = 4 << 30


@dataclass(frozen=True)
class ModelledImplementation:
    """`run(size)` makes a call that launches kernels, which is executed at two small sizes.

    sizes: two that are executed, or one where the size is the number of equal blocks of a launch.
    needs: a distribution that must be installed. around: operations of torch that belong to it and
    that its launcher does not do. eager: run(size) is recorded on fake tensors instead.
    multiprocessors: those of the device on which a size is executed, where the launcher
    chooses tiles by how many blocks there are for them. native: it launches kernels of csrc/cuda.
    """

    name: str
    run: Callable[[int], Callable[[], object]]
    sizes: tuple[int, ...] = ()
    needs: str | None = None
    around: tuple[TorchOp, ...] = ()
    eager: bool = False
    multiprocessors: Callable[[int], int] | None = None
    native: bool = False


@dataclass(frozen=True)
class Case:
    """A comparison of one op at one shape. floor: matmuls and bytes that nothing does without."""

    op: str
    shape: dict[str, int]
    size: int
    implementations: Sequence[ModelledImplementation]
    floor: TorchOp
    note: str
    dtype: str = "bf16"
    phase: str = "fwd+bwd"
    missing: tuple[tuple[str, str], ...] = ()


@contextmanager
def claiming_cuda():
    """Tensors of this process say that they are on a GPU."""
    with mock.patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)):
        yield


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def gradient(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def leaves(*shapes: tuple[int, ...], dtype=BF16) -> list[Tensor]:
    """Small values, so that exponentials of matmuls stay finite."""
    return [torch.full(shape, 0.01, dtype=dtype).requires_grad_() for shape in shapes]


def matmuls(count: int, m: int, n: int, k: int, moved: int) -> TorchOp:
    return TorchOp("floor", moved, count * 2 * m * n * k, "bf16")
