"""csrc includes downward only: op -> gemm -> core -> common, cuda/op -> cuda/core -> common."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
# What each layer may include besides itself; an operator is a layer of its own.
ALLOWED = {
    "schema.cpp": set(),
    "common": set(),
    "cpu/core": {"common"},
    "cpu/gemm": {"common", "cpu/core"},
    "cpu/op": {"common", "cpu/core", "cpu/gemm"},
    "cuda/core": {"common"},
    "cuda/op": {"common", "cuda/core"},
}


def folder_of(path: Path) -> str:
    """The folder that a file of csrc belongs to: common, cpu/<folder> or cuda/<folder>."""
    parts = path.parts
    return parts[0] if parts[0] == "common" or len(parts) == 1 else "/".join(parts[:2])


def layer_of(folder: str) -> str:
    if folder in ALLOWED:
        return folder
    device, _, name = folder.partition("/")
    assert device in ("cpu", "cuda") and name, f"csrc/{folder}: expected a layer of {list(ALLOWED)}"
    return f"{device}/op"


def violations(path: Path, text: str) -> list[str]:
    """What is wrong with the includes of the file at `path`, relative to csrc."""
    folder, found = folder_of(path), []
    for name in INCLUDE.findall(text):
        target = (CSRC / path.parent / name).resolve()
        if not target.is_file() or not target.is_relative_to(CSRC.resolve()):
            found.append(f"{path} includes {name}, which is no file of csrc")
            continue
        other = folder_of(target.relative_to(CSRC.resolve()))
        if other == folder:
            continue
        layer = layer_of(folder)
        if layer_of(other) == layer:
            found.append(f"{path} includes {name}, a header of another operator")
        elif layer_of(other) not in ALLOWED[layer]:
            found.append(f"{path} includes {name}: {layer} may not include {layer_of(other)}")
    return found


FILES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_go_downward(path):
    assert violations(path.relative_to(CSRC), path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "include", "complaint"),
    [
        ("common/element.h", "../cpu/core/simd.h", "common may not include cpu/core"),
        ("cpu/core/simd.h", "../gemm/pack.h", "cpu/core may not include cpu/gemm"),
        ("cpu/core/simd.h", "../matmul/kernel.h", "cpu/core may not include cpu/op"),
        ("cpu/gemm/pack.h", "../matmul/kernel.h", "cpu/gemm may not include cpu/op"),
        ("cpu/gemm/pack.h", "../../cuda/core/queue.h", "cpu/gemm may not include cuda/core"),
        ("cpu/matmul/isa.cpp", "../contrastive/rows.h", "a header of another operator"),
        ("cpu/momentum_contrastive/isa.cpp", "../contrastive/rows.h", "another operator"),
        ("cpu/ema/ema.cpp", "../../cuda/core/queue.h", "cpu/op may not include cuda/core"),
        ("cuda/core/launch.h", "../ema/ema.h", "cuda/core may not include cuda/op"),
        ("cuda/core/launch.h", "../../cpu/core/simd.h", "cuda/core may not include cpu/core"),
        ("cuda/ema/ema.cu", "../contrastive/contrastive.h", "a header of another operator"),
        ("cuda/ema/ema.cu", "../../cpu/gemm/pack.h", "cuda/op may not include cpu/gemm"),
        ("schema.cpp", "common/element.h", "schema.cpp may not include common"),
        ("cpu/gemm/pack.h", "gone.h", "no file of csrc"),
    ],
)
def test_a_planted_include_is_found(path, include, complaint):
    text = (CSRC / path).read_text()
    found = violations(Path(path), f'{text}\n#include "{include}"\n')
    assert len(found) == 1 and complaint in found[0]


@pytest.mark.parametrize("folder", ["tools", "cpu"])
def test_an_unknown_folder_is_found(folder):
    with pytest.raises(AssertionError, match="expected a layer"):
        layer_of(folder)
