"""The rules of the tree: imports go downward, private things stay private, siblings apart."""

from pathlib import Path

import pytest
from fastvlp_tests import layers
from fastvlp_tests.layers import Import

ROOT = Path(__file__).parents[1]
MODULES = layers.read(ROOT)
# The package's own __init__ gathers the public names of every layer.
BOUND = sorted(set(MODULES) - {"fastvlp"})


def imports_of(module):
    path = MODULES[module]
    return list(layers.imports(module, path.read_text(), path.name == "__init__.py"))


@pytest.mark.parametrize("module", BOUND)
def test_every_rule_holds(module):
    wrong = [
        f"{each.name}: {what}"
        for each in imports_of(module)
        for rule in layers.RULES
        if (what := rule(each))
    ]
    assert not wrong


def test_every_part_of_the_package_is_a_known_layer():
    assert {layers.layer(module) for module in BOUND} == set(layers.LAYERS)


def test_exceptions_are_needed():
    used = {
        (f"{package}.{here}", f"{package}.{there}")
        for module in BOUND
        for each in imports_of(module)
        for package in layers.SIBLINGS
        if (here := layers._part(each.module, package))
        and (there := layers._part(each.name, package))
    }
    assert set(layers.SIBLINGS_ALLOWED) <= used


def test_dynamic_imports_are_known():
    found = {m for m, path in MODULES.items() if layers.dynamic_imports(path.read_text())}
    assert found == set(layers.DYNAMIC)


def test_compiled_operators_are_named_in_ops():
    found = {m: layers.native_operators(path.read_text()) for m, path in MODULES.items()}
    elsewhere = {m: lines for m, lines in found.items() if lines and layers.layer(m) != "ops"}
    assert {m: len(lines) for m, lines in elsewhere.items()} == dict.fromkeys(
        layers.NATIVE_OPERATORS, 1
    )


def test_nothing_is_imported_in_a_circle():
    graph = {}
    for module in BOUND:
        names = {each.name for each in imports_of(module)}
        owners = {name.rpartition(".")[0] for name in names if name not in MODULES}
        graph[module] = ({*names, *owners} & set(MODULES)) - {module, "fastvlp"}
    assert len(graph) > 150
    assert layers.circles(graph) == []


@pytest.mark.parametrize(
    "rule, module, name",
    [
        (layers.goes_upward, "fastvlp.ops.ema.api", "fastvlp.nn.Linear"),
        (layers.goes_upward, "fastvlp.kernels._core.tiles", "fastvlp.ops.matmul"),
        (layers.goes_upward, "fastvlp.novel.thing", "fastvlp.ops"),
        (layers.goes_upward, "fastvlp.models.clip.model", "fastvlp.kernels.supported"),
        (layers.is_private_elsewhere, "fastvlp.nn.linear", "fastvlp.ops._core.checks.check_tensor"),
        (layers.is_private_elsewhere, "fastvlp.models.vilt.packing", "fastvlp.ops.packing._ranges"),
        (layers.is_a_siblings, "fastvlp.ops.ema.api", "fastvlp.ops.contrastive.checks"),
        (layers.is_a_siblings, "fastvlp.ops._core.checks", "fastvlp.ops.matmul.matmul"),
        (layers.is_a_siblings, "fastvlp.kernels.contrastive.forward",
         "fastvlp.kernels.cross_attention.host"),
        (layers.is_a_siblings, "fastvlp.models.clip.model", "fastvlp.models.albef.Albef"),
        (layers.is_beyond_a_kernel, "fastvlp.kernels.contrastive.forward", "torch.nn.functional"),
    ],
)  # fmt: skip
def test_a_violation_is_found(rule, module, name):
    assert rule(Import(module, name))


def test_a_dynamic_import_is_found():
    assert layers.dynamic_imports("import importlib\nx = importlib.import_module(name)") == [2]
    assert layers.dynamic_imports("import importlib.util") == []


def test_a_compiled_operator_is_found():
    assert layers.native_operators("import torch\ntorch.ops.fastvlp.matmul(a, b)") == [2]
    assert layers.native_operators("from torch import ops\nx = 1\nops.fastvlp.matmul") == [3]
    assert layers.native_operators("import fastvlp\nfastvlp.ops.matmul(a, b)") == []


def test_a_circle_is_found():
    graph = {"a": ["b"], "b": ["c"], "c": ["b", "d"], "d": []}
    assert layers.circles(graph) == [["b", "c"]]


def test_a_relative_import_is_resolved():
    text = "from . import x\nfrom ..b import y\nimport z"
    found = [each.name for each in layers.imports("fastvlp.a.c", text, is_package=False)]
    assert found == ["fastvlp.a.x", "fastvlp.b.y", "z"]
    (inside,) = layers.imports("fastvlp.a", "from .c import d", is_package=True)
    assert inside.name == "fastvlp.a.c.d"
