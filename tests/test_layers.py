"""Imports go downward only: train -> models, data, evaluate -> losses -> ops -> kernels."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each layer may import besides itself. `_native` is the loader of the compiled operators.
ALLOWED = {
    "_tracing": set(),
    "kernels": {"_tracing"},
    "_native": {"_tracing"},
    "distributed": set(),
    "ops": {"kernels", "_native", "_tracing", "distributed"},
    "losses": {"distributed", "ops"},
    "integrations": {"losses"},
    "nn": {"ops", "_tracing", "distributed"},
    "models": {"losses", "nn", "ops", "distributed", "masking"},
    "data": {"_native", "ops", "masking"},
    "evaluate": {"ops", "distributed"},
    "grad_cache": {"distributed"},
    "info": {"ops", "_native"},
    "optim": {"nn", "ops"},
    "masking": set(),
    "train": {
        "data", "distributed", "evaluate", "grad_cache", "losses",
        "masking", "models", "nn", "ops", "optim",
    },
    "commands": {"data", "evaluate", "models", "train"},
    "cli": {"commands", "data"},
}  # fmt: skip
FORBIDDEN_IN_KERNELS = ("torch.autograd", "torch.distributed", "torch.nn")


def layer_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return path.relative_to(ROOT / "fastvlp").parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Absolute names of everything that a file imports, relative imports resolved."""
    inside_kernels = path.is_relative_to(ROOT / "kernels")
    base = ROOT if inside_kernels else ROOT / "fastvlp"
    parts = list(path.relative_to(base).parent.parts)
    package = ["fastvlp", *parts]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*prefix, *filter(None, [node.module])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


FILES = sorted([*(ROOT / "fastvlp").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
# The package's own __init__ gathers the public names of every layer.
FILES.remove(ROOT / "fastvlp" / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path):
    layer = layer_of(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "fastvlp" and len(parts) > 1:
            known = parts[1] in ALLOWED
            assert not known or parts[1] in ALLOWED[layer] | {layer}, f"{layer} imports {name}"
        if layer == "kernels":
            assert not name.startswith(FORBIDDEN_IN_KERNELS), f"a kernel imports {name}"


def test_a_relative_import_is_resolved():
    assert "fastvlp.kernels.supported" in imported(ROOT / "fastvlp/ops/contrastive/checks.py")
    assert "fastvlp.ops" in imported(ROOT / "fastvlp/losses.py")
