"""Names of torch's stable ABI and of Triton: those the sources use, those a version has.

fastvlp promises torch 2.10 and Triton 3.6. The names that these versions have are kept in the two
lists next to this file, so that a test can tell a newer name without the old version at hand;
check_versions.py compares the lists with the versions themselves and writes them.
"""

import ast
import inspect
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
SHIM = ROOT / "csrc" / "common" / "stable_abi.h"
TORCH_LIST = Path(__file__).with_name("torch_2.10_names.txt")
TRITON_LIST = Path(__file__).with_name("triton_3.6_names.txt")
# What csrc may include: relative to torch's folder of headers.
TORCH_HEADERS = ("torch/csrc/stable", "torch/csrc/inductor/aoti_torch/c", "torch/headeronly")

# Symbols of torch's C++ classes and functions, which change from one version to the next.
_CPP_OF_TORCH = ("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch", "_ZNK5torch")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_MACRO = r"(?:STABLE_TORCH|STD_TORCH|STD_CUDA|TORCH|AOTI_TORCH|C10)_[A-Z0-9_]+"
_FUNCTION = r"(?:aoti_torch|torch)_[a-z0-9_]+"
_TYPE = r"(?:AOTI|Aten)[A-Z]\w+"
_PLAIN = re.compile(rf"\b({_MACRO}|{_FUNCTION}|{_TYPE})\b")
_QUALIFIED = re.compile(r"\btorch((?:::\w+)+)")
_INCLUDE = re.compile(r"#include\s*<((?:torch|c10|ATen)/[^>]+)>")
_DECLARED = re.compile(
    r"\bHIDDEN_NAMESPACE_BEGIN\(([\w, ]+)\)"
    r"|\b(?:enum\s+class|class|struct|enum|using|namespace)\s+(\w+)"
    r"|\binline\s+[\w:<>&*,\s]*?(\w+)\s*\("
    r"|\b(\w+)\s*=\s*\d+,"  # an enumerator
)
_SHIM_DEFINES = re.compile(r"#define\s+(\w+)|__attribute__\(\(weak\)\)\s+\w+\s+(\w+)\(")


def read_list(path: Path) -> set[str]:
    """The names of a list: one a line, after lines that begin with '#'."""
    return {line for line in path.read_text().split("\n") if line and not line.startswith("#")}


def write_list(path: Path, of: str, names: Iterable[str]) -> None:
    command = "python tests/compatibility/check_versions.py --write-lists"
    path.write_text(
        "\n".join([f"# The names of {of}, written by `{command}`.", *sorted(names), ""])
    )


def _code(path: Path) -> str:
    return _COMMENT.sub("", path.read_text())


def torch_names_used(files: Iterable[Path]) -> dict[str, set[str]]:
    """Every name of torch in C++ files, with the files that use it.

    A qualified name counts by its parts ("torch::stable::Tensor" as "::stable" and "::Tensor"),
    a header by its path.
    """
    used: dict[str, set[str]] = {}
    for path in files:
        code = _code(path)
        names = [*_PLAIN.findall(code), *_INCLUDE.findall(code)]
        names += [f"::{p}" for q in _QUALIFIED.findall(code) for p in q.split("::")[1:]]
        for name in names:
            used.setdefault(name, set()).add(path.name)
    return used


def shim_names() -> set[str]:
    """What the shim header defines for versions that lack it, or declares weak."""
    return {name for pair in _SHIM_DEFINES.findall(_code(SHIM)) for name in pair if name}


def torch_names_of(include: Path) -> set[str]:
    """The names that torch's headers in a folder `include` have, as `torch_names_used` has them."""
    names = set()
    for folder in TORCH_HEADERS:
        for path in (include / folder).rglob("*.h"):
            code = _code(path)
            names.add(str(path.relative_to(include)))
            names.update(_PLAIN.findall(code))
            for declared in _DECLARED.findall(code):
                names.update(f"::{part}" for text in declared for part in re.findall(r"\w+", text))
    return names


def needed_of_torch(built: Path, *options: str) -> set[str]:
    """What an object file or a library (with "-D") needs torch to export. Weak symbols not."""
    listed = subprocess.run(
        ["nm", *options, "--undefined-only", built], check=True, capture_output=True, text=True
    ).stdout
    symbols = [line.split()[-2:] for line in listed.splitlines()]
    prefixes = ("aoti_torch_", "torch_", *_CPP_OF_TORCH)
    return {symbol for kind, symbol in symbols if kind == "U" and symbol.startswith(prefixes)}


def triton_names_used(files: Iterable[Path]) -> dict[str, set[str]]:
    """Every name of Triton in Python files, with the files that use it.

    "tl.load" and "triton.cdiv" where the module has it, ".to" where a value inside a kernel has.
    """
    used: dict[str, set[str]] = {}
    for path in files:
        tree = ast.parse(path.read_text())
        for name in {*_module_names(tree), *_value_names(tree)}:
            used.setdefault(name, set()).add(path.name)
    return used


def _module_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if re.fullmatch(r"(tl|triton)(\.[A-Za-z]\w*)+", name):
                yield name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("triton"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _value_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(
            ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list
        ):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute) and not re.match(
                    r"(tl|triton)\.", ast.unparse(inner)
                ):
                    yield f".{inner.attr}"


def triton_names_here() -> set[str]:
    """The names that the installed Triton has, as `triton_names_used` has them."""
    import triton.backends.compiler
    import triton.backends.driver
    import triton.compiler
    import triton.language as tl

    names = {f"tl.{name}" for name in _public(tl)}
    for module in (tl.math, tl.extra):
        names |= {f"tl.{module.__name__.split('.')[-1]}.{name}" for name in _public(module)}
    names |= {f"triton.{name}" for name in _public(triton)}
    for module in (triton.compiler, triton.backends.compiler):
        names |= {f"{module.__name__}.{name}" for name in _public(module)}
    names |= {f"triton.runtime.{name}" for name in _public(triton.runtime)}
    names |= {f"triton.runtime.driver.{name}" for name in _public(type(triton.runtime.driver))}
    of_gpus = triton.backends.driver.GPUDriver
    names |= {f"triton.runtime.driver.active.{name}" for name in _public(of_gpus)}
    names |= {f"triton.runtime.driver.active.{name}" for name in _written(of_gpus)}
    for name in _public(triton.knobs):
        names.add(f"triton.knobs.{name}")
        group = getattr(triton.knobs, name)
        if isinstance(group, triton.knobs.base_knobs):
            names |= {f"triton.knobs.{name}.{knob}" for knob in _public(type(group))}
    for kind in (tl.tensor, tl.constexpr, tl.dtype, tl.pointer_type, tl.tensor_descriptor):
        names |= {f".{name}" for name in _public(kind)}
        names |= {f".{name}" for name in _written(kind)}
    # A constexpr that is an int has what every int has.
    return names | {f".{name}" for name in _public(int)}


def _written(kind: type) -> list[str]:
    """The attributes that instances have from their `__init__`."""
    return re.findall(r"self\.([a-z]\w*)", inspect.getsource(kind.__init__))


def _public(of: object) -> list[str]:
    return [name for name in dir(of) if not name.startswith("_")]
