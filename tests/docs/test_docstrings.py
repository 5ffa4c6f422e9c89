"""Public docstrings: what a user calls has an example, and every example gives what it says."""

import dataclasses
import doctest
import importlib
import inspect
from pathlib import Path

import pytest
import torch

import fastvlp
from fastvlp import nn, ops

MODULES = (
    "fastvlp", "fastvlp.evaluate.retrieval", "fastvlp.evaluate.zero_shot", "fastvlp.losses",
    "fastvlp.masking", "fastvlp.nn", "fastvlp.ops", "fastvlp.ops.packing", "fastvlp.optim",
    "fastvlp.models.checkpoints", "fastvlp.models.clip", "fastvlp.data",
)  # fmt: skip
# What stands on every page of the documentation with an example.
WITH_EXAMPLE = {
    "fastvlp": ("EmaModel", "FeatureQueue", "GradCache", "create"),
    "fastvlp.evaluate.retrieval": ("retrieval",),
    "fastvlp.evaluate.zero_shot": ("prompts",),
    "fastvlp.losses": ("ClipLoss", "SigLipLoss"),
    "fastvlp.masking": ("mask_tokens",),
    "fastvlp.models.clip": ("create",),
    "fastvlp.nn": ("FusionLayer", "Linear", "attention"),
    "fastvlp.ops": (
        "adamw_ema", "alignment_padding", "contrastive", "cross_attention", "ema", "explain",
        "matmul", "momentum_contrastive", "sigmoid_contrastive", "soft_cross_entropy",
        "word_patch_alignment",
    ),
    "fastvlp.ops.packing": ("PairLayout", "TextLayout"),
    "fastvlp.optim": ("AdamWEma",),
}  # fmt: skip


def public(module):
    """(name, object) of the functions and classes that a module offers."""
    module = importlib.import_module(module)
    names = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
    for name in names:
        found = getattr(module, name)
        called = inspect.isfunction(found) or inspect.isclass(found)
        if called and found.__module__.startswith("fastvlp"):
            yield name, found


PACKAGE = Path(fastvlp.__file__).parent
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text()]


def examples():
    """Every docstring of the package that has examples."""
    for file in FILES:
        name = ".".join((PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts))
        module = importlib.import_module(name.removesuffix(".__init__"))
        for test in doctest.DocTestFinder().find(module):
            if test.examples:
                yield pytest.param(test, id=test.name)


@pytest.mark.parametrize("test", [*examples()])
def test_example_gives_what_it_says(test, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    said = []
    results = doctest.DocTestRunner().run(test, out=said.append)
    assert results.attempted and not results.failed, "".join(said)


@pytest.mark.parametrize("module", WITH_EXAMPLE)
def test_what_users_call_has_an_example(module):
    found = dict(public(module))
    for name in WITH_EXAMPLE[module]:
        assert ">>>" in inspect.getdoc(found[name]), name


def test_an_operators_contract_stands_on_its_function():
    functions = [nn.attention if op == "attention" else getattr(ops, op) for op in ops.operators()]
    for function in functions:
        contract = inspect.getdoc(function)
        for part in ("Source: ", "Cost", "Args:", "Raises:", "Examples:"):
            assert part in contract, (function.__name__, part)


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_is_described(module):
    for name, found in public(module):
        assert inspect.getdoc(found), name
        if inspect.isclass(found) and dataclasses.is_dataclass(found):
            assert not found.__doc__.startswith(f"{name}("), name  # what dataclass writes
