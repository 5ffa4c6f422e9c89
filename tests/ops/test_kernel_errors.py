"""What a kernel raises reaches the caller at once: nothing swallows it or runs the kernel again."""

import ast
from pathlib import Path

import pytest
import torch

from fastvlp import ops

OPERATORS = set(ops.__all__) - {"explain", "operators", "release_workspace"}
ROOT = Path(__file__).parents[2]
X, IDS = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
ROWS, KEYS, STARTS = torch.zeros(4, 2, 8), torch.zeros(2, 3, 2, 8), torch.tensor([0, 2, 4])
WORDS, PADDING = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool)
# Each operator's kernel that comes first, and a call of the operator.
CALLS = {
    "adamw_ema": (
        "adamw_ema", lambda: ops.adamw_ema([X], [X + 1], [X + 2], [X + 3], step=1, lr=0.1)
    ),
    "contrastive": ("contrastive_loss", lambda: ops.contrastive(X, X, 1.0)),
    "cross_attention": (
        "cross_attention_forward", lambda: ops.cross_attention(ROWS, KEYS, KEYS, STARTS)
    ),
    "ema": ("ema_update", lambda: ops.ema([X], [X + 1], 0.5)),
    "momentum_contrastive": (
        "momentum_contrastive", lambda: ops.momentum_contrastive(X, X, X, X, X, X, 0.1)
    ),
    "sigmoid_contrastive": ("contrastive_sigmoid", lambda: ops.sigmoid_contrastive(X, X, 1.0)),
    "soft_cross_entropy": (
        "soft_cross_entropy_losses", lambda: ops.soft_cross_entropy(X, X, None, IDS)
    ),
    "word_patch_alignment": (
        "word_patch_alignment", lambda: ops.word_patch_alignment(WORDS, WORDS, PADDING, PADDING)
    ),
}  # fmt: skip
# Self-attention runs cross-attention's kernels, matmul's need AMX and large matrices.
OTHERS = {"attention", "matmul"}


def test_every_operator_is_among_them():
    assert set(CALLS) == set(ops.operators()) - OTHERS


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "kind", [torch.OutOfMemoryError, RuntimeError, TypeError, AttributeError, ArithmeticError]
)
def test_an_error_of_a_kernel_reaches_the_caller(monkeypatch, name, kind):
    calls = []
    kernel_name, call = CALLS[name]

    def kernel(*arguments):
        calls.append(arguments)
        raise kind("from the kernel")

    monkeypatch.setattr(torch.ops.fastvlp, kernel_name, kernel)
    with pytest.raises(kind, match="from the kernel"):
        call()
    assert len(calls) == 1


def runs_a_kernel(call: ast.Call, given: set[str]) -> bool:
    """An operator, an autograd function, a launch of a Triton kernel, a public function, or an
    argument of these names."""
    if isinstance(call.func, ast.Subscript):
        return True
    name = ast.unparse(call.func)
    if name == "torch.ops.load_library":  # a file that may be broken, no kernel
        return False
    return name.startswith("torch.ops.") or name.endswith(".apply") or name in OPERATORS | given


def enclosed_kernels(source: str) -> list[str]:
    """The calls of kernels inside of a `try`, and of functions that were given as arguments."""
    tree = ast.parse(source)
    given = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return [
        f"{node.lineno}: {ast.unparse(call)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        for statement in node.body
        for call in ast.walk(statement)
        if isinstance(call, ast.Call) and runs_a_kernel(call, given)
    ]


@pytest.mark.parametrize(
    "call", ["torch.ops.fastvlp.ema_update(x)", "kernel[grid](x)", "Product.apply(x)", "f(x)"]
)
def test_an_enclosed_kernel_is_found(call):
    source = f"def run(f, x):\n    try:\n        {call}\n    except RuntimeError:\n        raise"
    assert enclosed_kernels(source)


@pytest.mark.parametrize("folder", ["fastvlp/ops", "fastvlp/nn", "kernels"])
def test_no_try_encloses_a_kernel(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [f"{path}:{each}" for path in files for each in enclosed_kernels(path.read_text())]
    assert not found
