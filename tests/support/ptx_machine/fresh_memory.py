"""Which bytes of the tensors that host code makes have a value: torch.empty gives none."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

_EMPTY = frozenset(
    f"aten::{name}"
    for name in (
        "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"
    )
)  # fmt: skip


@dataclass
class _Marks:
    alive: StorageWeakRef
    written: np.ndarray


class FreshMemory(TorchDispatchMode):
    """While it is active, remembers the memory of empty tensors and what torch writes to it.

    What kernels write is entered by whoever runs them, into the array that `written` gives.
    """

    def __init__(self):
        super().__init__()
        self._marks: dict[int, _Marks] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        schema = function._schema
        if schema.name in _EMPTY:
            storage = result.untyped_storage()
            marks = np.zeros(storage.nbytes(), bool)
            self._marks[storage.data_ptr()] = _Marks(StorageWeakRef(storage), marks)
            return result
        for argument, value in zip(schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._fill(value)
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._fill(kwargs.get(argument.name))
        return result

    def written(self, storage: torch.UntypedStorage) -> np.ndarray | None:
        """[bytes] which of a storage's bytes have a value; None if all have."""
        marks = self._marks.get(storage.data_ptr())
        if marks is None or marks.alive.expired():
            return None
        return marks.written

    def _fill(self, value) -> None:
        for tensor in _tensors(value):
            written = self.written(tensor.untyped_storage())
            if written is not None and tensor.numel():
                size = tensor.element_size()
                torch.from_numpy(written).as_strided(
                    (*tensor.shape, size), (*(s * size for s in tensor.stride()), 1),
                    tensor.storage_offset() * size,
                ).fill_(True)  # fmt: skip


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for element in value:
            yield from _tensors(element)
