"""A CUDA device that is not there, for dry runs: what would run on it is compiled, not executed.

Inside `with DryDevice():` torch sees one GPU. Tensors put on it are `DryTensor`s: small ones have
values, which the CPU computes; large ones have a shape only, so that any size costs nothing.
fastvlp's operators run their CUDA host code, choice of tiles and launches included; every launch is
compiled exactly as Triton's runtime specialises it and then dropped; the results are zeros. Results
of operators that are compiled for CUDA are the CPU kernels' where the inputs have values. Events
give times that are made up and say nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from _gpu.check_folder import KEY_LIBRARY

TESTS = Path(__file__).resolve().parents[2] / "tests" / "support"
# Elements from which on a tensor has no values.
LARGE = 1 << 16
# Milliseconds between two events, made up.
FAKE_MS = 1.0
DEVICE = torch.device("cuda", 0)
# An address as torch's allocator gives them; Triton looks at its alignment.
ADDRESS = 1 << 20


class DryTensor(torch.Tensor):
    """A tensor that says it is on the GPU; `inner` is on the CPU, or on "meta" without values.

    To torch's C++ code it is a tensor on "meta", so that copies to and from it are copies.
    """

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        made = torch.Tensor._make_subclass(cls, _without_values(inner))
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def data_ptr(self) -> int:
        # Of tensors with values their own: operators ask which share memory.
        return self.inner.data_ptr() or ADDRESS + self.storage_offset() * self.element_size()

    def tolist(self) -> Any:
        # torch refuses it to subclasses.
        return _with_zeros(self.inner).tolist()

    def __setitem__(self, index: Any, value: Any) -> None:
        # torch would put a number on the device that it knows, which is "meta".
        if not isinstance(value, torch.Tensor):
            value = torch.tensor(value, dtype=self.dtype)
        super().__setitem__(index, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> DryTensor:
        copied = DryTensor(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):  # what makes a subclass a parameter
            copied._is_param = True
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _with_zeros(self.inner).__reduce_ex__(protocol)  # saved as from the CPU

    def get_device(self) -> int:
        return DEVICE.index

    def __repr__(self, *_: Any) -> str:
        return f"DryTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fastvlp":
            return _operator(func, args, kwargs)
        results = _computed(func, args, kwargs)
        device = kwargs.get("device")
        if device is not None and device.type == "cpu":  # a copy that leaves the GPU
            return tree_map_only(torch.Tensor, _with_zeros, results)
        if func._schema.is_mutable:
            return None if results is None else kwargs.get("out", args[0])
        results = tree_map_only(torch.Tensor, DryTensor, results)
        return return_and_correct_aliasing(func, args, kwargs, results) if func.is_view else results


def _computed(func, args: tuple, kwargs: dict) -> Any:
    """The results of an operator on `inner` tensors; zeros of what the CPU cannot compute."""
    valued = _valued(args, kwargs)
    inputs, named = tree_map(functools.partial(_inner, valued=valued), (args, kwargs))
    if valued and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CUDA"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):
            inputs, named = tree_map(functools.partial(_inner, valued=False), (args, kwargs))
            return tree_map_only(torch.Tensor, _with_zeros, _called(func, inputs, named))
    if not _DEPENDS_ON_VALUES.isdisjoint(func.tags):  # `item`, and what a mask selects
        inputs, named = tree_map_only(torch.Tensor, _with_zeros, (inputs, named))
    return _called(func, inputs, named)


_DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Products with an `out_dtype`, and where their factors stand. CUDA alone has them, and torch 2.11
# cannot tell what shape they have.
_WIDENED = {
    torch.ops.aten.mm.dtype: 0, torch.ops.aten.mm.dtype_out: 0,
    torch.ops.aten.addmm.dtype: 1, torch.ops.aten.addmm.dtype_out: 1,
}  # fmt: skip


def _called(func, inputs: Sequence[Any], named: dict[str, Any]) -> Any:
    if func not in _WIDENED:
        return func(*inputs, **named)
    a, b, dtype = inputs[_WIDENED[func] :][:3]
    return torch.empty(a.shape[0], b.shape[1], dtype=dtype, device="meta")


def _with_zeros(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it has values, else zeros of its shape."""
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor


def _valued(*arguments: Any) -> bool:
    """Whether none of the tensors among the arguments is without values."""
    for each in tree_flatten(arguments)[0]:
        if isinstance(each, torch.Tensor):
            # Autograd makes some tensors itself, on the device that C++ knows: "meta".
            if (each.inner if isinstance(each, DryTensor) else each).is_meta:
                return False
    return True


def _inner(value: Any, valued: bool) -> Any:
    """What an operator on `inner` tensors gets for one of its arguments."""
    if isinstance(value, torch.device):
        return torch.device("cpu" if valued else "meta")
    if not isinstance(value, torch.Tensor):
        return value
    inner = value.inner if isinstance(value, DryTensor) else value
    return inner if valued else _without_values(inner)


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on "meta", as a view of a storage of the same size."""
    if tensor.is_meta:
        return tensor
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = torch.empty(elements, dtype=tensor.dtype, device="meta")
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _operator(func, args: tuple, kwargs: dict) -> Any:
    """A fastvlp operator: its CUDA implementation for the launches and the results' shapes, or
    the CPU's where that is compiled."""
    results = None
    if _written_in_python(func.name()):
        shapes, named = tree_map_only(
            torch.Tensor, lambda t: DryTensor(_inner(t, valued=False)), (args, kwargs)
        )
        with _Placement():
            results = func.redispatch(_CUDA, *shapes, **named)
    valued = _valued(args, kwargs)
    if results is None:
        on_cpu = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU")
        given, named = tree_map(functools.partial(_inner, valued=valued and on_cpu), (args, kwargs))
        return tree_map_only(torch.Tensor, DryTensor, func(*given, **named))
    if not valued:
        return results
    # Zeros: the CPU's kernels do not take the blocks that the GPU's plan has chosen.
    return tree_map_only(
        DryTensor, lambda t: DryTensor(torch.zeros_like(t.inner, device="cpu")), results
    )


_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@functools.cache
def _written_in_python(name: str) -> bool:
    """Whether the implementation for CUDA tensors is Python code rather than compiled."""
    lines = torch._C._dispatch_dump(name).splitlines()
    return any(line.startswith("CUDA:") and ".py:" in line for line in lines)


# Pinned memory is had from the driver.
_PINNING = {
    torch.ops.aten.is_pinned.default: lambda tensor: False,
    torch.ops.aten._pin_memory.default: torch.clone,
}


class _Placement(TorchDispatchMode):
    """Makes DryTensors of what would be put on the GPU."""

    large = LARGE

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in _PINNING:
            return _PINNING[func](args[0])
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)  # fake tensors are of the device that they name
        inside = any(isinstance(t, DryTensor) for t in tree_flatten((args, kwargs))[0])
        if inside or device is None or device.type != "cuda":
            return func(*args, **kwargs)
        shaped = kwargs | {"device": torch.device("meta")}
        made = func(*tree_map_only(torch.Tensor, _without_values, args), **shaped)
        if made.numel() <= self.large:
            made = func(*args, **(kwargs | {"device": torch.device("cpu")}))
        return DryTensor(made)


class _Event:
    """An event whose times are made up."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def record(self, *_: Any) -> None:
        pass

    synchronize = wait = record

    def query(self) -> bool:
        return False  # the device never comes to what a clock has recorded

    def elapsed_time(self, _: _Event) -> float:
        return FAKE_MS


class _Stream:
    """A stream on which nothing runs."""

    cuda_stream = device_index = priority = 0
    device = DEVICE

    def __init__(self, *_: Any, **__: Any):
        pass

    def synchronize(self, *_: Any) -> None:
        pass

    wait_stream = wait_event = synchronize

    def query(self) -> bool:
        return True


class _Graph:
    """A captured graph, of launches that do not run."""

    def replay(self) -> None:
        pass

    reset = replay


class _Guard(contextlib.nullcontext):
    """`torch.cuda.device`, `stream` and `graph`."""

    def __init__(self, *_: Any, **__: Any):
        super().__init__()


_WITHOUT_RESULT = (
    "_lazy_init", "_sleep", "synchronize", "empty_cache", "set_device", "reset_peak_memory_stats",
    "manual_seed", "manual_seed_all",
)  # fmt: skip


def _nothing(*_: Any, **__: Any) -> None:
    pass


class DryDevice:
    """`with DryDevice() as device:` torch has one GPU that runs nothing, see the module.

    large: elements from which on a tensor has no values.
    """

    name = "dry run"

    def __init__(self, large: int = LARGE):
        if str(TESTS) not in sys.path:
            sys.path.append(str(TESTS))
        from ptx_machine.virtual_gpu import VirtualGPU

        self.large = large
        self.gpu = VirtualGPU(90, execute=False, hazards=False)

    @property
    def launches(self) -> list:
        """The launches so far, each with its compiled kernel."""
        return self.gpu.launches

    def _keys(self) -> contextlib.AbstractContextManager:
        """Keys of Triton's cache as of another Python's wheel: its libtriton.so is told apart."""
        library = os.environ.get(KEY_LIBRARY)
        if not library:
            return contextlib.nullcontext()
        import triton
        from triton.runtime import cache

        (own,) = Path(triton.__file__).parent.glob("_C/libtriton.so")
        mine, theirs = (hashlib.sha256(path.read_bytes()) for path in (own, Path(library)))
        key = cache.triton_key().replace(mine.hexdigest(), theirs.hexdigest())
        return mock.patch.object(cache, "triton_key", lambda: key)

    def _fakes(self) -> dict[str, Any]:
        real = self.gpu.device
        properties = types.SimpleNamespace(
            name=f"{real.name} ({self.name})", major=real.capability[0], minor=real.capability[1],
            total_memory=real.total_memory, L2_cache_size=50 << 20,
            multi_processor_count=real.multi_processor_count,
        )  # fmt: skip
        free = real.total_memory
        return {
            "is_available": lambda: True, "is_initialized": lambda: True,
            "device_count": lambda: 1, "current_device": lambda: 0,
            "get_device_name": lambda *_: properties.name,
            "get_device_capability": lambda *_: real.capability,
            "get_device_properties": lambda *_: properties,
            "mem_get_info": lambda *_: (free, free),
            "memory_allocated": lambda *_: 0, "memory_reserved": lambda *_: 0,
            "max_memory_allocated": lambda *_: 0, "clock_rate": lambda *_: 0,
            "current_stream": lambda *_: _Stream(), "default_stream": lambda *_: _Stream(),
            "is_current_stream_capturing": lambda: False,
            "is_bf16_supported": lambda *_, **__: True,
            # What is drawn there the CPU draws.
            "get_rng_state": lambda *_: torch.get_rng_state(),
            "set_rng_state": lambda state, *_: torch.set_rng_state(state),
            "CUDAGraph": _Graph, "graph": _Guard,
            "Event": _Event, "Stream": _Stream, "device": _Guard, "stream": _Guard,
            **dict.fromkeys(_WITHOUT_RESULT, _nothing),
        }  # fmt: skip

    def __enter__(self) -> DryDevice:
        # Before anything is replaced: it looks at all of torch.cuda when it is first imported.
        importlib.import_module("torch._dynamo")
        # torch asks for the current device where "cuda" has no index; there is no driver to ask.
        torch._C._ensureCUDADeviceGuardSet()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._keys())
            stack.enter_context(self.gpu)
            for name, fake in self._fakes().items():
                stack.enter_context(mock.patch.object(torch.cuda, name, fake))
            # It makes a tensor on the device before the first fake one.
            stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", _nothing))
            # Triton kernels take tensors of the device, as they would where it is.
            stack.enter_context(
                mock.patch("fastvlp.kernels._core.support.device_reasons", _reasons)
            )
            stack.enter_context(mock.patch.object(_Placement, "large", self.large))
            stack.enter_context(_Placement())
            lifts_cpu_only = torch._C._only_lift_cpu_tensors()
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda")
            stack.callback(torch._C._set_only_lift_cpu_tensors, lifts_cpu_only)
            # A module's parameters become DryTensors instead of being changed underneath.
            future = torch.__future__
            overwrites = future.get_overwrite_module_params_on_conversion()
            future.set_overwrite_module_params_on_conversion(True)
            stack.callback(future.set_overwrite_module_params_on_conversion, overwrites)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)


def _reasons(device: torch.device) -> list[str]:
    return [] if device.type == "cuda" else [f"Triton kernels run on CUDA devices, not {device}"]
