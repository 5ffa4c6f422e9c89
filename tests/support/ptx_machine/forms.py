"""The table of instruction forms, and the strict decoding of their modifiers and operands.

A form is a function registered for a mnemonic. It is given a `Decoder`, must take every modifier
and use every operand, and returns the operation: a function of `Lanes` that executes the
instruction for them. Whatever it leaves over is an error, never a guess.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .errors import ProgramError, UnknownForm
from .lanes import Lanes
from .syntax import (
    BITS,
    Immediate,
    Instruction,
    Kernel,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)

Operation = Callable[[Lanes], None]
Source = Callable[[Lanes], np.ndarray]
Destination = Callable[[Lanes, np.ndarray], None]

UNSIGNED = {1: np.dtype(bool), 8: np.dtype(np.uint8), 16: np.dtype(np.uint16),
            32: np.dtype(np.uint32), 64: np.dtype(np.uint64)}  # fmt: skip
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def dtype_of(kind: str) -> np.dtype:
    """The NumPy dtype that holds a PTX type. bf16 and packed types stay bit patterns."""
    if kind in FLOAT:
        return np.dtype(FLOAT[kind])
    if kind[0] == "s":
        return np.dtype(SIGNED[BITS[kind]])
    return UNSIGNED[BITS[kind]]


@dataclass(frozen=True)
class Form:
    """A registered mnemonic.

    scope: which threads must meet at the instruction before any may execute it: "lane" (none),
    "warp" or "warpgroup". pipe: the class of execution unit, for counting.
    """

    decode: Callable[["Decoder"], Operation]
    scope: str
    pipe: str


FORMS: dict[str, Form] = {}


def form(*mnemonics: str, pipe: str, scope: str = "lane"):
    """Register the decorated decoder for mnemonics; "a.b" goes before "a" when looked up."""

    def register(decode):
        for mnemonic in mnemonics:
            if mnemonic in FORMS:
                raise ValueError(f"{mnemonic} has two forms")
            FORMS[mnemonic] = Form(decode, scope, pipe)
        return decode

    return register


def find_form(instruction: Instruction) -> tuple[Form, list[str]]:
    """The form with the longest name that the opcode begins with, and the modifiers left."""
    parts = instruction.opcode.split(".")
    for length in range(len(parts), 0, -1):
        if found := FORMS.get(".".join(parts[:length])):
            return found, parts[length:]
    raise UnknownForm(
        f"line {instruction.line}: no form for {instruction.opcode} in {instruction.text!r}"
    )


@dataclass
class Decoder:
    """Modifiers and operands of one instruction, to be taken one by one."""

    instruction: Instruction
    kernel: Kernel
    modifiers: list[str]
    # Addresses of the kernel's variables by name, as (space, address).
    symbols: dict[str, tuple[str, int]]
    used: set[int] = field(default_factory=set)
    # The narrowest access to each address space, in bytes.
    units: dict[str, int] = field(default_factory=dict)
    # Slots of the registers that the instruction reads and writes.
    reads: set[int] = field(default_factory=set)
    writes: set[int] = field(default_factory=set)

    def error(self, reason: str) -> UnknownForm:
        line, text = self.instruction.line, self.instruction.text
        return UnknownForm(f"line {line}: {reason} in {text!r}")

    # Modifiers, left to right.

    def take(self, *choices: str) -> str | None:
        """The next modifier if it is one of `choices`, else None."""
        if self.modifiers and self.modifiers[0] in choices:
            return self.modifiers.pop(0)
        return None

    def need(self, *choices: str) -> str:
        """The next modifier, which must be one of `choices`."""
        found = self.take(*choices)
        if found is None:
            got = self.modifiers[0] if self.modifiers else "nothing"
            raise self.error(f"expected one of {', '.join(choices)}, got {got}")
        return found

    def finish(self) -> None:
        """Raise unless every modifier and operand was used."""
        if self.modifiers:
            raise self.error(f"modifier .{self.modifiers[0]} is not implemented")
        for i in range(len(self.instruction.operands)):
            if i not in self.used:
                raise self.error(f"operand {i + 1} was not expected")

    def touches(self, space: str, size: int) -> None:
        """The instruction accesses a space ("generic": any) `size` bytes at a time."""
        for name in ("global", "shared") if space == "generic" else (space,):
            self.units[name] = min(size, self.units.get(name, size))

    # Operands by position.

    def operand(self, i: int):
        if i >= len(self.instruction.operands):
            raise self.error(f"operand {i + 1} is missing")
        self.used.add(i)
        return self.instruction.operands[i]

    def has(self, i: int) -> bool:
        return i < len(self.instruction.operands)

    def source(self, i: int, kind: str) -> Source:
        return self.reader(self.operand(i), kind)

    def destination(self, i: int, kind: str) -> Destination:
        return self.writer(self.operand(i), kind)

    def elements(self, i: int, counts: tuple[int, ...]) -> tuple:
        """The elements of a vector operand with one of these lengths."""
        vector = self.operand(i)
        if not isinstance(vector, Vector) or len(vector.elements) not in counts:
            raise self.error(f"operand {i + 1} must be a vector of {counts} elements")
        return vector.elements

    def fragment(self, i: int, counts: tuple[int, ...]) -> Source:
        """A function that reads a vector of 32-bit registers as values [lanes, registers]."""
        elements = self.elements(i, counts)
        readers = [self.reader(element, "b32") for element in elements]

        def read(lanes):
            values = np.empty((lanes.count, len(readers)), np.uint32)
            for j, reader in enumerate(readers):
                values[:, j] = reader(lanes)
            return values

        return read

    def fragment_writer(self, i: int, counts: tuple[int, ...]) -> Destination:
        """The same for writing; a vector that is read too is read first."""
        writers = [self.writer(element, "b32") for element in self.elements(i, counts)]

        def write(lanes, values):
            for j, writer in enumerate(writers):
                writer(lanes, values[:, j])

        return write

    def constant(self, i: int, choices=None) -> int:
        """An integer constant, one of `choices` if those are given."""
        found = self.operand(i)
        if not isinstance(found, Immediate) or found.kind != "s":
            raise self.error(f"operand {i + 1} must be an integer constant")
        if choices is not None and found.value not in choices:
            raise self.error(f"operand {i + 1} must be one of {list(choices)}")
        return found.value

    def reader(self, operand, kind: str) -> Source:
        """A function that reads `operand` as values of a PTX type."""
        if isinstance(operand, Register):
            return self._register_reader(operand, kind)
        if isinstance(operand, Immediate):
            value = self._immediate(operand, kind)
            return lambda lanes: value
        if isinstance(operand, Special):
            return self._special_reader(operand, kind)
        if isinstance(operand, Symbol):
            if operand.name not in self.symbols:
                raise self.error(f"{operand.name} is not declared")
            if kind[0] == "f" or BITS[kind] < 32:
                raise self.error(f"the address of {operand.name} as {kind}")
            address = UNSIGNED[BITS[kind]].type(self.symbols[operand.name][1])
            return lambda lanes: address
        raise self.error(f"operand {operand} cannot be read as {kind}")

    def _register_reader(self, operand: Register, kind: str) -> Source:
        if BITS[operand.type] != BITS[kind]:
            raise self.error(f"{operand.name} is {operand.type}, read as {kind}")
        slot, name, dtype = operand.slot, operand.name, dtype_of(kind)
        plain = dtype is UNSIGNED[BITS[kind]]
        where = f"{self.kernel.name}, line {self.instruction.line}"
        self.reads.add(slot)

        def read(lanes):
            register = lanes.registers[slot]
            if register is None:
                raise ProgramError(f"{where}: {name} is read before it is written")
            found = register[lanes.index]
            return found if plain else found.view(dtype)

        if operand.negated:
            return lambda lanes: ~read(lanes)
        return read

    def _special_reader(self, operand: Special, kind: str) -> Source:
        name, bits = operand.name, BITS[kind]
        if bits < 32 or kind[0] == "f":
            raise self.error(f"{name} as {kind}")
        return lambda lanes: lanes.batch.special(name)[lanes.index].astype(UNSIGNED[bits])

    def _immediate(self, operand: Immediate, kind: str) -> np.generic:
        bits = BITS[kind]
        if operand.kind == "s":
            if kind[0] == "f" or kind == "bf16":
                raise self.error(f"the integer {operand.value} as {kind}")
            if kind == "pred":
                return np.bool_(operand.value != 0)
            pattern = UNSIGNED[bits].type(operand.value & ((1 << bits) - 1))
        elif kind[0] in "su" or bits != int(operand.kind[1:]):
            raise self.error(f"a constant of type {operand.kind} as {kind}")
        else:
            pattern = UNSIGNED[bits].type(operand.value)
        return pattern.view(dtype_of(kind))

    def writer(self, operand, kind: str) -> Destination:
        """A function that writes values of a PTX type to `operand`."""
        if isinstance(operand, Sink):
            return lambda lanes, values: None
        if not isinstance(operand, Register) or operand.negated:
            raise self.error(f"operand {operand} cannot be written")
        if BITS[operand.type] != BITS[kind]:
            raise self.error(f"{operand.name} is {operand.type}, written as {kind}")
        slot, dtype = operand.slot, UNSIGNED[BITS[kind]]
        self.writes.add(slot)

        def write(lanes, values):
            if values.dtype != dtype:
                if values.dtype.itemsize != dtype.itemsize or dtype.kind == "b":
                    raise TypeError(f"{values.dtype} values for a register of type {dtype}")
                values = values.view(dtype)
            register = lanes.registers[slot]
            if register is None:
                register = lanes.registers[slot] = np.zeros(lanes.batch.layout.size, dtype)
            register[lanes.index] = values

        return write

    def extending_writer(self, operand, kind: str) -> Destination:
        """`writer` to a register that may be wider than the type: by sign, or by zeros."""
        if not isinstance(operand, Register) or BITS[operand.type] <= BITS[kind]:
            return self.writer(operand, kind)
        wide = BITS[operand.type]
        write = self.writer(operand, f"b{wide}")
        if kind[0] == "f":
            raise self.error(f"{operand.name} is wider than {kind}")
        target = SIGNED[wide] if kind[0] == "s" else UNSIGNED[wide]
        return lambda lanes, values: write(lanes, values.astype(target))

    def pair(self, i: int, kind: str) -> tuple[Destination, Destination | None]:
        """Writers of d and p in an operand d or d|p."""
        found = self.operand(i)
        if isinstance(found, Pair):
            return self.writer(found.first, kind), self.writer(found.second, "pred")
        return self.writer(found, kind), None
