"""`explain` for every operator, and what an impossible setting of the environment does."""

import pytest
import torch

from fastvlp import info, ops
from fastvlp.ops import compiled, explain
from fastvlp.ops._core.dispatch import _OPERATORS, choose, operators, register_backends

X = torch.zeros(4, 8)


@pytest.mark.parametrize("op", operators())
def test_without_arguments_an_example_is_explained(monkeypatch, op):
    monkeypatch.delenv("FASTVLP_BACKEND", raising=False)
    example = _OPERATORS[op].example
    tensors = {
        name: [torch.zeros(each) for each in shape]
        if isinstance(shape, list)
        else torch.zeros(shape)
        for name, shape in example.items()
    }
    found = explain(op)
    assert found.chosen is not None
    if not torch.cuda.is_available():
        assert found == explain(op, *tensors.values())
        assert found == explain(op, **tensors)


@pytest.mark.parametrize("op", operators())
def test_arguments_of_another_kind_are_named(op):
    first, *others = _OPERATORS[op].example
    kind = "(torch.Tensor|list of tensors)"
    with pytest.raises(TypeError, match=f"^{first}: expected a {kind}, got str"):
        explain(op, "text", *[X] * len(others))
    with pytest.raises(TypeError, match=f"^{first}: expected the arguments of {op}, at least"):
        explain(op, unknown=X)


@pytest.mark.parametrize("variable, value", [
    ("FASTVLP_CPU_ISA", "amx_of_another_processor"),
    ("FASTVLP_BACKEND", "cuda"),
    ("FASTVLP_ATTENTION", "flash"),
])  # fmt: skip
def test_the_report_shows_an_impossible_setting(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    text = info.report()
    assert f"{variable}: expected one of " in text
    assert f"got {value!r}" in text
    assert text.startswith("fastvlp ") and "CPU kernels compiled for" in text
    if variable != "FASTVLP_ATTENTION":
        assert "contrastive: runs nowhere" in text


def test_an_impossible_backend_is_reported_for_each_operator(monkeypatch):
    monkeypatch.setenv("FASTVLP_BACKEND", "triton")
    if not torch.cuda.is_available():
        assert "contrastive: runs nowhere\n  not triton: the Triton kernels" in info.report()


def test_nothing_runs_in_place_of_an_impossible_instruction_set(monkeypatch):
    usable = torch.ops.fastvlp.cpu_instruction_sets().split(",")
    for name in usable:
        monkeypatch.setenv("FASTVLP_CPU_ISA", name)
        assert compiled.instruction_set_fault() is None
    # As on a CPU without AMX.
    monkeypatch.setenv("FASTVLP_CPU_ISA", "amx2")
    found = explain("contrastive", X, X)
    assert found.chosen is None
    assert found.reasons["native"] == found.reasons["reference"]
    fault = f"FASTVLP_CPU_ISA: expected one of {', '.join(usable)}, .*got 'amx2'; unset it"
    with pytest.raises(RuntimeError, match=fault):
        choose("matmul", X, X.T)
    with pytest.raises(RuntimeError, match=fault):
        ops.contrastive(X, X, 1.0)
    other = torch.zeros(4, 8, device="meta")
    assert "FASTVLP_CPU_ISA" not in str(explain("contrastive", other, other))


def test_no_reasons_are_asked_of_backends_behind_the_first_that_can_run(monkeypatch):
    monkeypatch.delenv("FASTVLP_BACKEND", raising=False)
    asked = []

    def candidate(name, reasons):
        return lambda *_: asked.append(name) or reasons

    register_backends(
        "planted", example={"x": (2,)}, triton=candidate("triton", ["no"]),
        native=candidate("native", []), reference=candidate("reference", []),
    )  # fmt: skip
    try:
        assert choose("planted", X) == "native" and asked == ["triton", "native"]
        assert explain("planted", X).reasons["reference"] == ["native is preferred"]
        monkeypatch.setenv("FASTVLP_BACKEND", "reference")
        assert choose("planted", X) == "reference"
    finally:
        del _OPERATORS["planted"]
