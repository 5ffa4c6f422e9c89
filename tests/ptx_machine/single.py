"""Runs one instruction on arrays of operands, for the tests of instruction forms."""

from collections.abc import Sequence

import numpy as np

from . import machine, parser
from .lanes import WARP
from .memory import GlobalMemory
from .program import Program
from .schedule import Schedule

_TYPES = {"b1": "pred", "u1": "u8", "u2": "b16", "u4": "b32", "u8": "b64", "f4": "f32", "f8": "f64"}
_FLOATS = {"f32": np.float32, "f64": np.float64}


def execute(instruction: str, results: str | Sequence[str], **operands: np.ndarray):
    """The results of `instruction`, by one thread for each element of the operands.

        execute("add.s32 d, a, 5", "b32", a=np.arange(10, dtype=np.uint32))

    In the text each operand stands by its name: a register of its dtype's type (bool: predicate,
    signed integers as unsigned ones). results: the types of the registers d, e, f, ... Returns
    their values, unsigned or floating, or the only one's. 32 neighbours are a warp; the last warp
    is filled up with operands of the first threads.
    """
    kinds = (results,) if isinstance(results, str) else tuple(results)
    names = [chr(ord("d") + i) for i in range(len(kinds))]
    arrays = [np.asarray(values) for values in operands.values()]
    count = max((len(values) for values in arrays), default=1)
    size = -(-count // WARP) * WARP
    declared = [f".reg .{kind} {name};" for name, kind in zip(names, kinds, strict=True)]
    declared += [f".reg .{_type(v)} {name};" for name, v in zip(operands, arrays, strict=True)]
    text = f".target sm_90\n.entry one()\n{{ {' '.join(declared)} {instruction}; ret; }}"
    program = Program(parser.parse(text).kernels["one"])
    blocks = size // WARP
    batch = machine.Batch(
        program, (blocks, 1, 1), (WARP, 1, 1), np.arange(blocks), np.zeros(0, np.uint8),
        GlobalMemory(), 0, Schedule(),
    )  # fmt: skip
    for slot, values in enumerate(arrays, len(kinds)):
        bits = values if values.dtype == bool else values.view(f"u{values.itemsize}")
        batch.registers[slot] = np.resize(bits, size)
    batch.run(())
    found = [
        batch.registers[slot][:count].view(_FLOATS[kind])
        if kind in _FLOATS
        else batch.registers[slot][:count]
        for slot, kind in enumerate(kinds)
    ]
    return tuple(found) if len(found) > 1 else found[0]


def _type(values: np.ndarray) -> str:
    kind = "u" if values.dtype.kind == "i" else values.dtype.kind
    return _TYPES[f"{kind}{values.itemsize}"]
