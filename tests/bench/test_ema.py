"""bench/ema.py: what it compares computes the same, and a quick run writes every row."""

import ema
import pytest
import torch
from _harness import measure
from fastvlp_tests.bench_runs import missing_names, quick_rows


@pytest.fixture(autouse=True)
def few_parameters(monkeypatch):
    monkeypatch.setattr(ema, "shapes", lambda blocks: [(5, 3), (7,), (1,), (blocks + 1, 2)])


@pytest.fixture(params=ema.PHASES)
def phase(request):
    return request.param


def test_every_implementation_makes_the_same_first_update(phase):
    inputs = ema.build(0, "cpu", gradients=True)
    before = [p.detach().clone() for p in inputs.model.parameters()]
    truth = ema.float64(phase, inputs)
    implementations, _ = ema.implementations(phase)
    names = [each.name for each in implementations]
    assert names[:2] == [measure.OURS, measure.BOUND] and len(set(names)) == len(names)
    for implementation in implementations:
        result = implementation.make(inputs)()
        if implementation.bound:
            assert result is None
            continue
        found = implementation.unify(inputs, result)
        assert {"momentum"} <= set(found) == set(truth)
        for name, value in truth.items():
            low = name in ("copy", "low")
            tolerance = {"rtol": 2**-8, "atol": 0} if low else {}
            torch.testing.assert_close(found[name].float(), value.float(), **tolerance)
        assert all(map(torch.equal, before, inputs.model.parameters()))


def test_later_calls_go_on_updating(phase):
    inputs = ema.build(0, "cpu", gradients=True)
    ends = []
    for implementation in ema.implementations(phase)[0]:
        call = implementation.make(inputs)
        call()
        result = call()
        if not implementation.bound:
            ends.append(implementation.unify(inputs, result)["momentum"])
    assert not torch.equal(ends[0].double(), ema.float64(phase, inputs)["momentum"])
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0])


def test_the_floor_moves_the_bytes_it_names(phase, monkeypatch):
    inputs = ema.build(0, "cpu", gradients=False)
    sizes, real = [], torch.zeros

    def zeros(*shape, **options):
        sizes.append(shape)
        return real(*shape, **options)

    monkeypatch.setattr(torch, "zeros", zeros)
    ema.traffic(ema.BYTES[phase], inputs)()
    (two, count), parameters = sizes[0], sum(p.numel() for p in inputs.model.parameters())
    # Two values read and one written, of four bytes each; whole values in every part.
    excess = 12 * count * ema.FLOOR_PARTS - ema.BYTES[phase] * parameters
    assert two == 2 and -12 < excess < 12 * ema.FLOOR_PARTS


@pytest.mark.parametrize("flags", [["--phase", "forward"], ["--blocks", "13"], ["--blocks", "-1"]])
def test_wrong_flags_end_with_a_message(flags, capsys):
    with pytest.raises(SystemExit):
        ema.parse(flags)
    assert flags[0] in capsys.readouterr().err


def test_the_paper_has_145_million_parameters(monkeypatch):
    monkeypatch.undo()
    assert 144e6 < sum(torch.Size(shape).numel() for shape in ema.shapes(12)) < 146e6


def test_a_quick_run_writes_every_row(tmp_path, capsys):
    meta, rows = quick_rows(ema.main, tmp_path / "ema.json", "--blocks", "0", "--no-memory")
    assert {row["phase"] for row in rows} == set(ema.PHASES)
    missing = missing_names(meta)
    for phase in ema.PHASES:
        expected, absent = ema.implementations(phase)
        group = {row["impl"]: row for row in rows if row["phase"] == phase}
        assert set(group) == {each.name for each in expected}
        assert {each.name for each in absent} <= missing
        for row in group.values():
            assert row["op"] == "ema" and row["dtype"] == "fp32"
            assert row["shape"] == {"parameters": 25}
            assert row["error"] is None or row["error"] < 1e-6
    assert {"timm ModelEmaV3", "apex axpby"} <= missing | {row["impl"] for row in rows}
    printed = capsys.readouterr().out
    assert "as fast as fused + foreach" in printed and "of the floor's speed" in printed


def test_peak_memory_is_that_of_an_update_not_of_its_state(tmp_path):
    flags = ["--blocks", "0", "--phase", "step+copy"]
    _, rows = quick_rows(ema.main, tmp_path / "ema.json", *flags)
    peaks = {row["impl"]: row["peak_mb"] for row in rows}
    assert peaks.pop(measure.BOUND) is None
    assert peaks["albef loop"] > peaks[measure.OURS] and peaks[measure.OURS] < 1.0
