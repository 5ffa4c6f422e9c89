"""Triton kernels: torch tensors in, torch tensors out.

Nothing here knows autograd, process groups or modules, and nothing here chooses between
implementations; `fastvlp.ops` does. Ask `supported` first: it answers without importing Triton,
so this package imports on a machine that has none. The kernel modules themselves
(`fastvlp.kernels.contrastive`, ...) import Triton at the top.
"""

from ._core.support import (
    align,
    alignment_supported,
    attention_supported,
    device_reasons,
    storage_factor,
    supported,
)

__all__ = [
    "align",
    "alignment_supported",
    "attention_supported",
    "device_reasons",
    "storage_factor",
    "supported",
]
