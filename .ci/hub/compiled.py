"""Schemas for the Triton kernels, where there are no compiled operators."""

import torch

from .schemas import NAMESPACE, SCHEMAS

_WHY = "this build has no compiled kernels; install fastvlp for them"

_library = torch.library.Library(NAMESPACE, "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)


def load() -> tuple[str, ...]:
    """Why there are no compiled operators for CPU tensors."""
    return (_WHY,)


def load_cuda() -> tuple[str, ...]:
    """Why there are none for CUDA tensors."""
    return (_WHY,)


def missing_schemas() -> tuple[str, ...]:
    """Nothing: the operators have their schemas."""
    return ()


def instruction_set_fault() -> None:
    """Nothing is wrong with FASTVLP_CPU_ISA, which has no effect here."""
