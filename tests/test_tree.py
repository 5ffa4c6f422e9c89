"""One operator, one name, the same folder everywhere; what the documents name exists."""

import importlib
import re
from pathlib import Path

import pytest

from fastvlp import nn, ops
from fastvlp.ops._core.dispatch import _OPERATORS, operators

ROOT = Path(__file__).parents[1]
# Operators that are another face of the operator in whose folder they are.
FACES = {
    "adamw_ema": "ema",
    "attention": "cross_attention",
    "sigmoid_contrastive": "contrastive",
}
# Folders beside the operators': what operators share, and the native operator of the images.
SHARED = {
    "csrc/cpu": {"core", "gemm", "images"},
    "csrc/cuda": {"core"},
    "kernels": {"_core"},
    "fastvlp/ops": {"_core", "packing"},
    "tests/ops": {"_core", "packing"},
    "tests/kernels": {"_core"},
    "bench/baselines": set(),
    "bench/results": set(),
}
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# The operator that CONTRIBUTING.md adds.
EXAMPLE = "row_norms"
_DOTTED = re.compile(r"(?<![\w./-])fastvlp(?:\.[A-Za-z_]\w*)+")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)[^)]*\)")
_PATH = re.compile(r"`((?:bench|csrc|docs|examples|fastvlp|kernels|tests)/[\w./-]+)`")
_IMPORT = re.compile(r"\bfrom (fastvlp[\w.]*) import (\([^)]*\)|[^\n(#`]+)")


def folder(op: str) -> str:
    return FACES.get(op, op)


def has_files(path: Path) -> bool:
    """Whether a folder has files of its own; what Python leaves behind does not count."""
    return any(file.is_file() and "__pycache__" not in file.parts for file in path.rglob("*"))


def missing_folders(op: str, root: Path = ROOT) -> list[str]:
    """The places where an operator's name finds nothing."""
    places = [f"fastvlp/ops/{folder(op)}", f"tests/ops/{folder(op)}"]
    places += [f"bench/results/{folder(op)}"]
    if "native" in _OPERATORS[op].candidates:
        places += [f"csrc/cpu/{folder(op)}"]
    if "triton" in _OPERATORS[op].candidates:
        places += [f"kernels/{folder(op)}", f"tests/kernels/{folder(op)}"]
    missing = [place for place in places if not has_files(root / place)]
    scripts = (root / f"bench/{folder(op)}.py", root / f"bench/baselines/{folder(op)}/__init__.py")
    if not any(script.is_file() for script in scripts):
        missing.append(f"bench/{folder(op)}.py or bench/baselines/{folder(op)}")
    if not (root / f"docs/ops/{folder(op)}.md").is_file():
        missing.append(f"docs/ops/{folder(op)}.md")
    return missing


@pytest.mark.parametrize("op", operators())
def test_an_operators_name_finds_it_everywhere(op):
    assert missing_folders(op) == []
    function = nn.attention if op == "attention" else getattr(ops, op)
    package = f"fastvlp.ops.{folder(op)}"
    assert function.__module__.startswith(f"{package}."), function.__module__
    assert getattr(importlib.import_module(package), op) is function


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "fastvlp/ops/matmul/__pycache__").mkdir(parents=True)
    (tmp_path / "fastvlp/ops/matmul/__pycache__/api.pyc").touch()
    (tmp_path / "csrc/cpu/matmul").mkdir(parents=True)
    (tmp_path / "csrc/cpu/matmul/matmul.cpp").touch()
    assert missing_folders("matmul", tmp_path) == [
        "fastvlp/ops/matmul", "tests/ops/matmul", "bench/results/matmul",
        "bench/matmul.py or bench/baselines/matmul", "docs/ops/matmul.md",
    ]  # fmt: skip


@pytest.mark.parametrize("place", SHARED)
def test_each_folder_is_an_operators(place):
    found = {path.name for path in (ROOT / place).iterdir() if path.is_dir() and has_files(path)}
    assert found - SHARED[place] <= {folder(op) for op in operators()}
    assert SHARED[place] <= found


def names_in(text: str) -> set[str]:
    """The dotted names of fastvlp in a document, those of its imports among them."""
    names = {name for name in _DOTTED.findall(text)}
    for module, imported in _IMPORT.findall(text):
        plain = re.sub(r"#[^\n]*", "", imported).strip("()\n ")
        for part in filter(None, map(str.strip, plain.split(","))):
            names.add(f"{module}.{part.split()[0]}")
    return names


def resolve(name: str) -> object:
    """What a dotted name stands for: an attribute, a module that nobody imported yet, or one that a
    function of its name hides."""
    first, *parts = name.split(".")
    found, path = importlib.import_module(first), first
    for part in parts:
        if not hasattr(found, part):
            found = importlib.import_module(path)
        path = f"{path}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
    return found


def test_names_are_found_in_a_document():
    text = """Use `fastvlp.ops.explain`, `python -m fastvlp.info`; see fastvlp/losses.py.
    from fastvlp.nn import (
        FusionLayer,  # of text and images
        Linear as OurLinear,
    )
    from fastvlp import losses, GradCache  # both"""
    assert names_in(text) == {
        "fastvlp.ops.explain", "fastvlp.info", "fastvlp.nn", "fastvlp.nn.FusionLayer",
        "fastvlp.nn.Linear", "fastvlp.losses", "fastvlp.GradCache",
    }  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_name_in_the_documents_exists(document):
    for name in sorted(names_in(document.read_text())):
        assert resolve(name) is not None, name


def test_a_module_is_found_behind_the_function_of_its_name():
    assert resolve("fastvlp.ops.matmul.matmul") is ops.matmul


def test_a_name_that_does_not_exist_is_noticed():
    with pytest.raises(ModuleNotFoundError, match="fastvlp.losses.CLIPLoss"):
        resolve("fastvlp.losses.CLIPLoss")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_in_the_documents_exists(document):
    text = document.read_text()
    paths = [document.parent / link for link in _LINK.findall(text)]
    paths += [ROOT / path for path in _PATH.findall(text) if EXAMPLE not in path]
    assert [str(path.relative_to(ROOT)) for path in paths if not path.exists()] == []
