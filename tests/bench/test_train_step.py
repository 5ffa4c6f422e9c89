"""bench/train_step.py: its implementations train the same model, a quick run writes every row."""

import pytest
import torch
import train_step
from _harness import measure
from fastvlp_tests.bench_runs import quick_rows


@pytest.fixture(params=train_step.MODELS)
def case(request):
    return train_step.Case(request.param, "tiny", 3, False)


def test_every_form_starts_from_the_same_losses(case):
    inputs = train_step.build(case)
    exact = train_step.reference_losses(inputs)
    for implementation in train_step.implementations(case.adapter):
        found = implementation.make(inputs)()
        assert found.keys() == exact.keys()
        relative = 1e-2 if implementation.name == train_step.LOW else 1e-5
        for name, value in exact.items():
            torch.testing.assert_close(found[name].double(), value.double(), rtol=relative, atol=0)


def test_steps_change_weights(case):
    inputs = train_step.build(case)
    for form in train_step.forms(case.adapter).values():
        step = train_step.Step(*form, inputs)
        before = {k: v.clone() for k, v in step.model.named_parameters() if v.requires_grad}
        step()
        changed = {k for k, v in step.model.named_parameters() if k in before and v.grad is None}
        changed = {k for k in changed if not torch.equal(before[k], step.model.get_parameter(k))}
        assert len(changed) > 0.9 * len(before)
        assert step.marks == sorted(step.marks) and len(step.marks) == 4


def test_steps_change_momentum_and_queue():
    inputs = train_step.build(train_step.Case("albef", "tiny", 3, False))
    weight, momentum = (f"{p}.visual_encoder.pos_embed" for p in ("student", "momentum.module"))
    for form in train_step.FORMS.values():
        step = train_step.Step(*form, inputs)
        before = {k: v.clone() for k, v in step.model.state_dict().items()}
        step()
        after = step.model.state_dict()
        changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
        assert {k.split(".")[0] for k in changed} >= {"student", "momentum", "queue"}
        torch.testing.assert_close(after[momentum], before[momentum].lerp(after[weight], 0.005))


def test_parts_and_their_work(case):
    inputs = train_step.build(case)
    packed, padded = (case.adapter.work("tiny", inputs.batch, packed=p) for p in (True, False))
    assert packed.keys() == padded.keys()
    assert all(packed[name] <= padded[name] for name in packed)
    assert packed["backward"] < padded["backward"]
    for name in (measure.OURS, "reference, SDPA"):
        parts = train_step.parts(train_step.FORMS[name], inputs, 1)
        assert packed.keys() < parts.keys() and all(ms > 0 for ms in parts.values())


def test_a_quick_run(tmp_path, capsys):
    meta, rows = quick_rows(
        train_step.main, tmp_path / "step.json", "--parts", "1", "--no-memory", "--lengths",
        "random", "--batch", "2",
    )  # fmt: skip
    albef = [row["impl"] for row in rows if row["op"].startswith("albef")]
    assert albef == list(train_step.FORMS)
    assert {row["op"].split()[0] for row in rows} == set(train_step.MODELS)
    assert {row["phase"] for row in rows} == {"step"}
    assert set(meta["parts"][-1]["parts"]) == set(train_step.FORMS)
    printed = capsys.readouterr().out
    assert "x as fast as reference" in printed and "student: fusion" in printed


@pytest.mark.parametrize(
    "flags", [["--batch", "0"], ["--parts", "-1"], ["--form", "reference, SDPA"]]
)
def test_bad_flags(flags):
    with pytest.raises(SystemExit):
        train_step.parse(flags)
