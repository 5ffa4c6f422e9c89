"""Compile Triton kernels ahead of time, with no GPU, and read what the compiler made of them.

`python -m fastvlp.kernels` prints the register table of every kernel. A module of an operator's
folder lists what is to be compiled in its function `aot_cases()`.
"""

import argparse
import importlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .support import ROUNDED_MATMULS, rounds_matmuls

# Shared memory one block may use, in bytes, by compute capability.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
# One SASS line: optional predicate, then the opcode with its dotted modifiers.
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
# Of a case's name what comes before dtype and tile.
_KERNEL = re.compile(r"\S+( (?!bf16|fp16|fp32|\d)\S+)*")
_TENSOR_CORE = re.compile(r"^([HIQDO]MMA|[HIQ]GMMA|UTC\w*MMA)$")


@dataclass(frozen=True)
class Case:
    """One kernel at one configuration for one architecture.

    signature maps every argument that is not in `constants` to a Triton type ("*bf16", "i32").
    Pointers, and the integers named in `aligned`, are promised to be multiples of 16, as the
    launcher would find them for usual inputs; without the promise the loads are scalar.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    capability: int
    warps: int
    stages: int
    aligned: tuple[str, ...] = ()
    tensor_cores: bool = False
    fusion: bool = True
    most_registers: int | None = None

    def error_row(self, error: BaseException) -> str:
        """The table's row for a case that does not compile: the end of a long message tells."""
        said = " ".join(str(error).split())
        return f"{self.name:<44} sm_{self.capability:<4} does not compile: {said[-160:]}"


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a case. Counts are of instructions in the SASS."""

    name: str
    capability: int
    shared_bytes: int
    registers: int
    stack_bytes: int
    local_loads: int
    local_stores: int
    tensor_core: dict[str, int] = field(default_factory=dict)

    @property
    def spills(self) -> bool:
        return self.local_loads + self.local_stores + self.stack_bytes > 0

    def row(self) -> str:
        mma = " ".join(f"{name}:{count}" for name, count in self.tensor_core.items()) or "-"
        return (
            f"{self.name:<44} sm_{self.capability:<4} {self.registers:>4} {self.shared_bytes:>8} "
            f"{self.stack_bytes:>6} {self.local_loads:>4} {self.local_stores:>4}  {mma}"
        )


HEADER = (
    f"{'kernel':<44} {'arch':<7} {'regs':>4} {'shared':>8} {'stack':>6} {'LDL':>4} {'STL':>4}  "
    "tensor-core instructions"
)


def compile_case(case: Case) -> Compiled:
    """Compile one case. Raises ValueError when arguments are missing from the signature."""
    compiled = binary_of(case)
    return inspect_cubin(case, compiled.asm["cubin"], compiled.metadata.shared)


def binary_of(case: Case) -> Any:
    """What `triton.compile` makes of a case, every stage of it in `asm`."""
    names = case.kernel.arg_names
    missing = [n for n in names if n not in case.signature and n not in case.constants]
    if missing:
        raise ValueError(f"{case.name}: no type or constant for the arguments {missing}")
    signature = {n: "constexpr" if n in case.constants else case.signature[n] for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in case.aligned
    }
    return triton.compile(
        ASTSource(case.kernel, signature, dict(case.constants), attributes),
        target=GPUTarget("cuda", case.capability, 32),
        options={
            "num_warps": case.warps,
            "num_stages": case.stages,
            "enable_fp_fusion": case.fusion,
            "maxnreg": case.most_registers,
        },
    )


def inspect_cubin(case: Case, cubin: bytes, shared_bytes: int) -> Compiled:
    """Read registers, stack and instruction counts out of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuda_tool("cuobjdump", "--dump-resource-usage", path)
        # The same text as with its analysis of the data flow, which takes a third longer.
        sass = _cuda_tool("nvdisasm", "--no-dataflow", "--print-code", path)
    # The figures are printed per function; a kernel that called others would have several.
    opcodes = Counter(_OPCODE.findall(sass))
    return Compiled(
        name=case.name,
        capability=case.capability,
        shared_bytes=shared_bytes,
        registers=max(map(int, re.findall(r"REG:(\d+)", usage))),
        stack_bytes=max(map(int, re.findall(r"STACK:(\d+)", usage))),
        local_loads=opcodes["LDL"],
        local_stores=opcodes["STL"],
        tensor_core={k: v for k, v in sorted(opcodes.items()) if _TENSOR_CORE.match(k)},
    )


def _cuda_tool(name: str, *arguments: Any) -> str:
    """Run one of the CUDA binary tools that the Triton wheel carries."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = [str(tool), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def all_cases() -> list[Case]:
    """The cases of every kernel module: of every one in an operator's folder with `aot_cases`."""
    paths = sorted(Path(__file__).parents[1].glob("[!_]*/[!_]*.py"))
    package = __package__.rpartition(".")[0]
    names = (f"{package}.{path.parent.name}.{path.stem}" for path in paths)
    modules = [importlib.import_module(name) for name in names]
    described = [module for module in modules if hasattr(module, "aot_cases")]
    return [case for module in described for case in module.aot_cases()]


def _compile_index(index: int) -> Compiled:
    return compile_case(all_cases()[index])


def compile_all(workers: int, pattern: str = "") -> Iterator[tuple[Case, Future]]:
    """Every case whose "sm_<capability> <name>" holds the regular expression, as it is compiled.

    In the order of `all_cases`, on `workers` processes. The future has the `Compiled` or the
    compiler's error.
    """
    cases = all_cases()
    wanted = [i for i, c in enumerate(cases) if re.search(pattern, f"sm_{c.capability} {c.name}")]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_compile_index, i) for i in wanted]
        for index, future in zip(wanted, futures, strict=True):
            future.exception()
            yield cases[index], future


def is_refused(case: Case, compiled: Compiled) -> bool:
    """Whether no operator would launch the case, because Triton rounds its float32 matmuls."""
    rounded = case.capability // 10 in ROUNDED_MATMULS and rounds_matmuls()
    return rounded and _on_wrong_units(case, compiled)


def _on_wrong_units(case: Case, compiled: Compiled) -> bool:
    return bool(compiled.tensor_core) != case.tensor_cores


def faults(case: Case, compiled: Compiled) -> list[str]:
    """Why a compiled case must not ship; empty where it may."""
    if is_refused(case, compiled):
        return []
    found = []
    if compiled.spills:
        found.append("spills")
    if compiled.shared_bytes > SHARED_LIMIT[case.capability]:
        found.append("too much shared memory")
    if _on_wrong_units(case, compiled):
        found.append("no tensor cores" if case.tensor_cores else "tensor cores round float32")
    return found


class Summary:
    """How many cases, and what is wrong with how many: by kernel and GPU, and by GPU how close
    they come to the limits."""

    def __init__(self):
        self.faults = 0
        self._of: dict[int, list[tuple[str, Compiled | None, list[str]]]] = {}

    def add(self, case: Case, compiled: Compiled | None) -> None:
        """`compiled` is None for a case that does not compile."""
        found = faults(case, compiled) if compiled else ["not compiled"]
        self.faults += len(found)
        if compiled and is_refused(case, compiled):
            found = ["refused (TF32)"]
        kernel = _KERNEL.match(case.name).group()
        self._of.setdefault(case.capability, []).append((kernel, compiled, found))

    def table(self) -> Iterator[str]:
        """A Markdown table of the cases of each kernel by GPU, with what is wrong with how many."""
        yield "| kernel |" + "".join(f" sm_{capability} |" for capability in sorted(self._of))
        yield "|---" * (1 + len(self._of)) + "|"
        for kernel in dict.fromkeys(k for of in self._of.values() for k, _, _ in of):
            cells = []
            for _, of in sorted(self._of.items()):
                found = [found for k, _, found in of if k == kernel]
                counts = Counter(fault for each in found for fault in each)
                cells.append(f"{len(found)}" + "".join(f", {n} {f}" for f, n in counts.items()))
            yield f"| {kernel} | " + " | ".join(cells) + " |"

    def lines(self) -> Iterator[str]:
        for capability, of in sorted(self._of.items()):
            done = [compiled for _, compiled, _ in of if compiled]
            counts = Counter(fault for _, _, found in of for fault in found)
            notes = "".join(f", {n} {name}" for name, n in counts.items())
            yield (
                f"sm_{capability}: {len(of)} cases{notes}; at most "
                f"{max((c.registers for c in done), default=0)} of 255 registers, "
                f"{max((c.shared_bytes for c in done), default=0):,} of "
                f"{SHARED_LIMIT[capability]:,} bytes of shared memory"
            )


def main(arguments: list[str] | None = None) -> int:
    """Print the register table and summaries of it; status 1 when a kernel does not compile,
    spills, does not fit or takes the wrong units."""
    parser = argparse.ArgumentParser(prog="python -m fastvlp.kernels", description=__doc__)
    parser.add_argument("-j", "--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument(
        "-k", dest="pattern", default="", metavar="REGEX",
        help='only the cases that match, such as "sm_90 forward"',
    )  # fmt: skip
    options = parser.parse_args(arguments)
    print(f"Triton {triton.__version__}\n{HEADER}", flush=True)
    summary = Summary()
    for case, future in compile_all(options.jobs, options.pattern):
        error = future.exception()
        summary.add(case, None if error else future.result())
        print(case.error_row(error) if error else future.result().row(), flush=True)
    print("", *summary.table(), "", *summary.lines(), sep="\n")
    return 1 if summary.faults else 0
