"""A kernel made ready to run: each instruction decoded once, its variables given addresses."""

import struct
from dataclasses import dataclass

import numpy as np

from . import (  # noqa: F401  (each registers its instruction forms)
    conversions,
    copy_instructions,
    floats,
    integers,
    matrix_instructions,
    mbarrier_instructions,
    memory_instructions,
    moves,
    tensor_instructions,
    warp_instructions,
)
from .control import Control
from .forms import Decoder, Operation, find_form
from .memory import SHARED_BASE
from .syntax import Address, Instruction, Kernel, Symbol, Vector


@dataclass(frozen=True, eq=False)
class Step:
    """One decoded instruction: an operation on lanes, or a decision about control."""

    instruction: Instruction
    guard: int | None
    scope: str
    pipe: str
    operation: Operation | None
    control: Control | None
    # Slots of registers.
    reads: frozenset[int]
    writes: frozenset[int]


class Program:
    """`kernel` decoded. Raises UnknownForm if any of its instructions is not implemented.

    static_shared: bytes of shared memory that its own variables take; dynamic_base: where the
    extern array begins; constants: arrays of its variables in constant and global memory; units:
    bytes of the narrowest access to a space.
    """

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.symbols: dict[str, tuple[str, int]] = {}
        self.constants: dict[str, np.ndarray] = {}
        self._place_variables()
        # Matrices count in words.
        self.units = {"global": 4, "shared": 4}
        self.steps = [self._decode(instruction) for instruction in kernel.instructions]

    def _place_variables(self) -> None:
        used: set[str] = set()
        for instruction in self.kernel.instructions:
            for operand in instruction.operands:
                used |= _symbols(operand)
        for parameter in self.kernel.parameters:
            self.symbols[parameter.name] = ("param", parameter.offset)
        top, dynamic = SHARED_BASE, []
        for variable in self.kernel.variables.values():
            if variable.name not in used:
                continue
            if variable.space == "shared" and variable.bytes is None:
                dynamic.append(variable)
            elif variable.space == "shared":
                top = -(-top // variable.align) * variable.align
                self.symbols[variable.name] = ("shared", top)
                top += variable.bytes
            elif variable.space in ("const", "global"):
                data = variable.data or bytes(variable.bytes)
                array = np.frombuffer(bytearray(data.ljust(8, b"\0")), np.uint8)
                self.constants[variable.name] = array
                self.symbols[variable.name] = ("global", array.ctypes.data)
            # A variable of another space is missed where it is used.
        align = max((variable.align for variable in dynamic), default=1)
        self.dynamic_base = -(-top // align) * align
        for variable in dynamic:
            self.symbols[variable.name] = ("shared", self.dynamic_base)
        self.static_shared = self.dynamic_base - SHARED_BASE

    def _decode(self, instruction: Instruction) -> Step:
        form, modifiers = find_form(instruction)
        decoder = Decoder(instruction, self.kernel, list(modifiers), self.symbols)
        made = form.decode(decoder)
        decoder.finish()
        control = made if isinstance(made, Control) else None
        guard = instruction.guard.slot if instruction.guard else None
        operation = None if control else made
        for space, size in decoder.units.items():
            if space in self.units:
                self.units[space] = min(self.units[space], size)
        reads, writes = frozenset(decoder.reads), frozenset(decoder.writes)
        return Step(
            instruction, guard, form.scope, form.pipe, operation, control, reads, writes
        )  # fmt: skip

    def pack(self, values: list) -> np.ndarray:
        """The parameter block for Python values: ints, floats, or bytes for structures."""
        parameters = self.kernel.parameters
        if len(values) != len(parameters):
            raise ValueError(
                f"{self.kernel.name} takes {len(parameters)} parameters, got {len(values)}"
            )
        block = bytearray(self.kernel.parameter_bytes)
        for parameter, value in zip(parameters, values, strict=True):
            if isinstance(value, bytes):
                data = value
            elif parameter.type in ("f32", "f64"):
                data = struct.pack("<f" if parameter.type == "f32" else "<d", value)
            else:
                bits = 8 * parameter.bytes
                data = (int(value) & ((1 << bits) - 1)).to_bytes(parameter.bytes, "little")
            if len(data) != parameter.bytes:
                raise ValueError(
                    f"{parameter.name} has {parameter.bytes} bytes, the value {len(data)}"
                )
            block[parameter.offset : parameter.offset + len(data)] = data
        return np.frombuffer(bytes(block), np.uint8)


def _symbols(operand) -> set[str]:
    if isinstance(operand, Symbol):
        return {operand.name}
    if isinstance(operand, Address):
        return _symbols(operand.base)
    if isinstance(operand, Vector):
        return set().union(*(_symbols(element) for element in operand.elements))
    return set()
