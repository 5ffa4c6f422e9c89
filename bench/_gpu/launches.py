"""Records what host code launches: Triton kernels, executed as PTX and counted, and torch ops.

The machine that executes PTX is tooling of the tests: tests/support is put on the path here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from _gpu.chips import A100, H100
from _gpu.occupancy import l1_share
from _gpu.schedule import TracedStep

sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))

from ptx_machine.counts import SECTOR, Counts  # noqa: E402
from ptx_machine.l1_cache import L1Cache  # noqa: E402
from ptx_machine.program import Program  # noqa: E402
from ptx_machine.syntax import Immediate  # noqa: E402
from ptx_machine.trace import Trace  # noqa: E402
from ptx_machine.virtual_gpu import VirtualGPU, program_of  # noqa: E402


@dataclass(frozen=True)
class Binary:
    """What the compiler made of a kernel."""

    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int


@dataclass
class KernelLaunch:
    """A launch of a kernel. argument_bytes: of the tensors that it was given, each once. constants:
    what Triton compiled it for.

    Where it was executed, `counts` are over all its blocks and `steps` those of one warp.
    """

    kernel: str
    blocks: int
    binary: Binary
    argument_bytes: int
    constants: tuple[tuple[str, object], ...] = ()
    counts: Counts | None = None
    pipes: dict[str, str] = field(default_factory=dict)
    steps: list[TracedStep] = field(default_factory=list)
    # What `_gpu.bound` makes of it, by the name of the chip.
    profiles: dict[str, object] = field(default_factory=dict)

    def watched(self, program: Program, counts: Counts, trace: Trace) -> None:
        """The launch has been executed."""
        self.counts, self.steps = counts, [_traced(step) for step in trace.steps]
        self.pipes = {step.instruction.opcode: step.pipe for step in program.steps}


@dataclass(frozen=True)
class TorchOp:
    """An operation of torch, which a vendor's or torch's own kernel does: its bytes, and the
    floating point operations of a matmul (0 for any other) with operands of `kind`."""

    name: str
    bytes: int
    flops: int = 0
    kind: str = ""


Event = KernelLaunch | TorchOp
MOVE_NOTHING = ("empty", "new_empty", "_local_scalar", "prim::", "_unsafe_view", "detach", "lift")
# In-place operations that do not look at what they overwrite.
WRITE_ONLY = ("copy_", "fill_", "zero_")
MATMULS = ("mm", "addmm", "bmm", "baddbmm")
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
KINDS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}


def record(
    run: Callable[[], object],
    capability: int,
    execute: bool,
    multiprocessors: int | None = None,
    native: bool = False,
) -> list[Event]:
    """What `run()` launches on a virtual GPU, in order.

    execute False: kernels and matmuls do nothing, so that sizes can be those of a GPU.
    multiprocessors: those that the GPU reports, if others than its own. native: whether the
    operators of csrc/cuda take part, which then must be compiled.
    """
    from fastvlp.kernels.contrastive import gradient_sums

    recorder = _Recorder(capability, execute, multiprocessors)
    log = _TorchOps(recorder.events, execute)
    with ExitStack() as stack:
        if native:
            from _gpu import cuda

            stack.enter_context(cuda.recording(recorder.events, capability, execute))
        stack.enter_context(recorder)
        # A CPU lacks the operation that a GPU has here: fp32 results of half precision operands.
        matmul = log.float32_matmul(gradient_sums.float32_matmul)
        stack.enter_context(mock.patch.object(gradient_sums, "float32_matmul", matmul))
        stack.enter_context(log)
        run()
    return recorder.events


def record_eager(make: Callable[[], Callable[[], object]]) -> list[Event]:
    """What the call that `make()` returns would have torch do, on fake tensors of any size."""
    events: list[Event] = []
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autocast warns that there is no GPU
        run = make()
        with _TorchOps(events, execute=True):
            run()
    return events


class _Recorder(VirtualGPU):
    def __init__(self, capability: int, execute: bool, multiprocessors: int | None):
        super().__init__(capability, execute, hazards=False, multiprocessors=multiprocessors)
        self.events: list[Event] = []

    def launch(self, compiled, x, y, z, stream, function, packed, metadata, enter, leave, *values):
        given = {
            value.data_ptr(): value.numel() * value.element_size()
            for value in values
            if isinstance(value, torch.Tensor)
        }
        binary = _inspect(compiled)
        self.observers = partial(observers, self.capability, binary)
        # Torch's operations inside the machine are none of the program's.
        with _disable_current_modes():
            super().launch(
                compiled, x, y, z, stream, function, packed, metadata, enter, leave, *values
            )
        found = KernelLaunch(
            compiled.name, x * y * z, binary, sum(given.values()), _constants(compiled)
        )
        if self.execute:
            found.watched(program_of(compiled.asm["ptx"]), *self.launches[-1].observers)
        self.events.append(found)


def _constants(compiled) -> tuple[tuple[str, object], ...]:
    parameters = compiled.src.fn.params
    found = ((parameters[at[0]], value) for at, value in compiled.src.constants.items())
    return tuple((each.name, value) for each, value in found if each.is_constexpr)


def observers(capability: int, binary: Binary) -> tuple[Counts, Trace]:
    """They watch an execution, with the L1 cache of a chip of that capability."""
    chip = {80: A100, 90: H100}[capability]
    share = l1_share(chip, binary.warps, binary.registers, binary.shared_bytes)
    return Counts(l1=L1Cache(share // SECTOR)), Trace()


@cache
def _inspect(compiled) -> Binary:
    from fastvlp.kernels._core import aot

    case = aot.Case(compiled.name, None, {}, {}, 0, compiled.metadata.num_warps, 0)
    found = aot.inspect_cubin(case, compiled.asm["cubin"], compiled.metadata.shared)
    return Binary(case.warps, found.registers, found.stack_bytes, found.shared_bytes)


def _traced(step) -> TracedStep:
    numbers = [each.value for each in step.instruction.operands if isinstance(each, Immediate)]
    guard = () if step.guard is None else (step.guard,)
    return TracedStep(
        step.instruction.opcode, step.pipe, (*step.reads, *guard), tuple(step.writes),
        numbers[0] if numbers and "wait" in step.instruction.opcode else 0,
    )  # fmt: skip


class _TorchOps(TorchDispatchMode):
    """Appends the operations that move data; views and allocations do not."""

    def __init__(self, events: list[Event], execute: bool):
        super().__init__()
        self.events, self.execute = events, execute

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if func.namespace == "fastvlp":
            with self:  # it is made of others
                return func.redispatch(_CPU, *args, **kwargs)
        if name.rstrip("_") in MATMULS:
            return self._multiply(name, func, args, kwargs)
        result = func(*args, **kwargs)
        if not _is_view(func) and not name.startswith(MOVE_NOTHING):
            read = args[1:] if name.endswith(WRITE_ONLY) else args
            written = args[0] if result is None and args else result
            moved = _bytes(tree_leaves((read, kwargs))) + _bytes(tree_leaves(written))
            if moved:
                self.events.append(TorchOp(name, moved))
        return result

    def _multiply(self, name, func, args, kwargs):
        adds = "add" in name
        a, b = args[1:3] if adds else args[:2]
        dtype = next((arg for arg in args if isinstance(arg, torch.dtype)), a.dtype)
        self.events.append(matmul_of(a, b, dtype.itemsize, _bytes(args[:1]) if adds else 0))
        out = args[0] if name.endswith("_") else kwargs.get("out")
        if self.execute and dtype == a.dtype:
            return func(*args, **kwargs)
        if self.execute:  # a CPU has no matmuls with wider results
            made = torch.matmul(a.to(dtype), b.to(dtype))
            return made if out is None else out.copy_(made)
        return a.new_empty(*a.shape[:-1], b.shape[-1], dtype=dtype) if out is None else out

    def float32_matmul(self, original):
        """In place of fastvlp.kernels' own: one matmul with fp32 results."""

        def multiply(a, b, total=None):
            self.events.append(matmul_of(a, b, result=4))
            with _disable_current_modes():
                if self.execute:
                    return original(a, b, total)
                made = torch.empty(a.shape[0], b.shape[1])
                return made if total is None else total

        return multiply


def matmul_of(a, b, result: int | None = None, added: int = 0) -> TorchOp:
    """The operation a @ b; result: bytes of its elements, by default those of a's. added: bytes of
    what is read to be added to it."""
    rows, depth, columns = a.shape[:-1].numel(), a.shape[-1], b.shape[-1]
    out = rows * columns * (result or a.element_size())
    moved = a.numel() * a.element_size() + b.numel() * b.element_size() + out + added
    return TorchOp("matmul", moved, 2 * rows * depth * columns, KINDS[a.dtype])


def _is_view(func) -> bool:
    returns = func._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _bytes(values) -> int:
    """Of tensors, each storage once."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return sum({t.untyped_storage()._cdata: t.numel() * t.element_size() for t in tensors}.values())


def kernels(events: list[Event]) -> dict[str, list[KernelLaunch]]:
    """The launches of Triton kernels by name."""
    found: dict[str, list[KernelLaunch]] = {}
    for event in events:
        if isinstance(event, KernelLaunch):
            found.setdefault(event.kernel, []).append(event)
    return found
