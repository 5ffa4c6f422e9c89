"""The parts of a PTX module as the parser hands them on."""

from dataclasses import dataclass, field

# Bits of every fundamental type; a predicate is one.
BITS = {
    "pred": 1,
    "b8": 8, "u8": 8, "s8": 8,
    "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "tf32": 32,
    "b64": 64, "u64": 64, "s64": 64, "f64": 64,
    "b128": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Register:
    """A register: `slot` is its index in the register file of its kernel."""

    name: str
    type: str
    slot: int
    negated: bool = False


@dataclass(frozen=True)
class Special:
    """A read-only register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or the bit pattern of a float (`kind` is "s", "f32" or "f64")."""

    value: int
    kind: str


@dataclass(frozen=True)
class Symbol:
    """The name of a label, variable or parameter."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]; coordinates are those of a tensor, as in [base, {x, y}]."""

    base: "Register | Symbol | Immediate"
    offset: int = 0
    coordinates: "Vector | None" = None


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}"""

    elements: tuple


@dataclass(frozen=True)
class Pair:
    """a|b: a value and the predicate that says whether it is valid."""

    first: object
    second: object


@dataclass(frozen=True)
class Sink:
    """_: a result that nobody wants."""


@dataclass(frozen=True, eq=False)  # by identity: every step that runs is looked up
class Instruction:
    """One instruction. `opcode` is mnemonic and modifiers as written, `line` counts from 1."""

    opcode: str
    operands: tuple
    guard: Register | None
    line: int
    text: str

    @property
    def mnemonic(self) -> str:
        return self.opcode.split(".", 1)[0]


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter at `offset` in the block of parameters."""

    name: str
    type: str
    count: int
    align: int
    offset: int

    @property
    def bytes(self) -> int:
        return BITS[self.type] // 8 * self.count


@dataclass(frozen=True)
class Variable:
    """A variable of the space "shared", "local", "const" or "global"; `bytes` is None if extern
    and of no stated size."""

    name: str
    space: str
    align: int
    bytes: int | None
    data: bytes | None = None


@dataclass
class Kernel:
    """An entry: parameters, launch bounds, variables in sight, instructions and labels."""

    name: str
    parameters: list[Parameter]
    block_size: tuple[int, int, int] | None
    variables: dict[str, Variable]
    register_types: list[str] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.bytes for p in self.parameters), default=0)


@dataclass
class Module:
    """A translation unit: the target (as in "sm_90a") and its kernels by name."""

    target: str
    kernels: dict[str, Kernel]
