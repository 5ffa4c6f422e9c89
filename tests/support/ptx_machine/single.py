"""Runs one instruction on arrays of operands, for the tests of instruction forms."""

from collections.abc import Sequence

import numpy as np

from . import machine, parser
from .lanes import WARP
from .memory import GlobalMemory
from .observer import Observer
from .program import Program
from .schedule import Schedule

_TYPES = {"b1": "pred", "u1": "u8", "u2": "b16", "u4": "b32", "u8": "b64", "f4": "f32", "f8": "f64"}
_FLOATS = {"f32": np.float32, "f64": np.float64}


def execute(
    instruction: str,
    results: str | Sequence[str],
    *,
    buffers: Sequence[np.ndarray] = (),
    block: int = WARP,
    schedule: Schedule | None = None,
    observers: tuple[Observer, ...] = (),
    **operands: np.ndarray,
):
    """The results of `instruction`, by one thread for each element of the operands.

        execute("add.s32 d, a, 5", "b32", a=np.arange(10, dtype=np.uint32))

    In the text, which may be several statements, each operand stands by its name: a register of its
    dtype's type (bool: predicate, signed integers as unsigned ones). results: the types of the
    registers d, e, f, ... Returns their values, unsigned or floating, or the only one's. Blocks
    have `block` threads; threads beyond the last operand repeat the first ones. buffers: memory
    that the threads may touch, changed in place. observers watch.
    """
    kinds = (results,) if isinstance(results, str) else tuple(results)
    arrays = [np.asarray(values) for values in operands.values()]
    count = max((len(values) for values in arrays), default=1)
    program = _program(instruction, kinds, dict(zip(operands, map(_type, arrays), strict=True)))
    memory = GlobalMemory()
    for i, buffer in enumerate(buffers):
        memory.register_array(f"buffer {i}", buffer)
    blocks = -(-count // block)
    batch = machine.Batch(
        program, (blocks, 1, 1), (block, 1, 1), np.arange(blocks), np.zeros(0, np.uint8), memory,
        program.static_shared, schedule or Schedule(),
    )  # fmt: skip
    # [slots]: the thread of the grid that lies in each.
    thread = batch.layout.block * block + batch.layout.thread
    for slot, values in enumerate(arrays, len(kinds)):
        bits = values if values.dtype == bool else values.view(f"u{values.itemsize}")
        batch.registers[slot] = np.resize(bits, blocks * block)[thread]
    batch.run(observers)
    found = []
    for register, kind in zip(batch.registers, kinds, strict=False):
        values = np.empty_like(register)
        values[thread] = register
        found.append(values[:count].view(_FLOATS.get(kind, values.dtype)))
    return tuple(found) if len(found) > 1 else found[0] if found else None


def _program(instruction: str, results: Sequence[str], operands: dict[str, str]) -> Program:
    """The kernel of `instruction`; the registers of the results come first, then the operands'."""
    declared = [f".reg .{kind} {chr(ord('d') + i)};" for i, kind in enumerate(results)]
    declared += [f".reg .{kind} {name};" for name, kind in operands.items()]
    text = f".target sm_90\n.entry one()\n{{ {' '.join(declared)} {instruction}; ret; }}"
    return Program(parser.parse(text).kernels["one"])


def _type(values: np.ndarray) -> str:
    kind = "u" if values.dtype.kind == "i" else values.dtype.kind
    return _TYPES[f"{kind}{values.itemsize}"]
