"""bench/momentum_contrastive.py: every implementation computes the loss, a quick run every row."""

import momentum_contrastive
import pytest
import torch
from _harness import measure
from fastvlp_tests.bench_runs import assert_all_compute, missing_names, quick_rows
from torch.utils.flop_counter import FlopCounterMode

SIZES = {"batch": 6, "queue": 40, "dim": 24}


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("bf16", 3e-2)])
def test_every_implementation_computes_the_same(dtype, tolerance):
    inputs = momentum_contrastive.inputs(**SIZES, dtype=dtype, device="cpu")
    truth = momentum_contrastive.float64(inputs)
    assert set(truth) == {"loss", "d_image", "d_text", "d_temperature"}
    implementations = momentum_contrastive.implementations(dtype, compiled=False)
    names = [each.name for each in implementations]
    assert names[:2] == [measure.OURS, measure.BOUND] and len(set(names)) == len(names)
    assert_all_compute(implementations, inputs, truth, tolerance)


def test_compiled_peers_stand_beside_the_eager_ones():
    compiled = [
        each
        for each in momentum_contrastive.implementations("bf16", compiled=True)
        if each.compiled
    ]
    assert {each.name for each in compiled} == {
        f"{form} {how} compiled" for form in ("paper", "tuned") for how in ("fp32", "autocast")
    }


def test_inputs_are_the_same_each_time_and_of_unit_length():
    one, other = (
        momentum_contrastive.inputs(**SIZES, dtype="fp32", device="cpu") for _ in range(2)
    )
    assert all(map(torch.equal, one.low, other.low))
    for rows in (*one.features, *one.queues):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    assert all(map(torch.equal, (t.T for t in one.columns), one.queues))


def test_the_floor_does_exactly_the_matmuls_it_names():
    inputs = momentum_contrastive.inputs(**SIZES, dtype="fp32", device="cpu")
    call = momentum_contrastive.matmuls(inputs)
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == 2 * 3 * 2 * 6 * 40 * 24


@pytest.mark.parametrize("flags", [["--batch", "0"], ["--queue", "-1"], ["--dtype", "int8"]])
def test_wrong_flags_end_with_a_message(flags, capsys):
    with pytest.raises(SystemExit):
        momentum_contrastive.main(flags)
    assert flags[0] in capsys.readouterr().err


def test_a_quick_run_writes_every_row(tmp_path, capsys):
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    meta, rows = quick_rows(
        momentum_contrastive.main, tmp_path / "run.json", "--no-compile", *sizes
    )
    assert "torch.compile" in missing_names(meta)
    for dtype in ("fp32", "bf16"):
        group = {row["impl"]: row for row in rows if row["dtype"] == dtype}
        assert set(group) == {
            each.name for each in momentum_contrastive.implementations(dtype, compiled=False)
        }
        for name, row in group.items():
            assert row["op"] == "momentum_contrastive" and row["phase"] == "fwd+bwd"
            assert row["shape"] == {"b": 6, "q": 40, "d": 24}
            assert (row["peak_mb"] is None) == (name == measure.BOUND)
    printed = capsys.readouterr().out
    assert "as fast as paper autocast" in printed and "as fast as tuned fp32" in printed
