"""bench/soft_cross_entropy.py: every implementation computes the loss, a quick run every row."""

import functools

import pytest
import soft_cross_entropy
import torch
from _harness import measure
from fastvlp_tests.bench_runs import assert_all_compute, missing_names, quick_rows
from torch.utils.flop_counter import FlopCounterMode


def compared(dtype, teacher, quick=False):
    implementations, _ = soft_cross_entropy.implementations(
        dtype, "cpu", teacher, compile_=False, quick=quick
    )
    return implementations


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("bf16", 3e-2)])
def test_every_implementation_computes_the_same(dtype, tolerance, teacher):
    inputs = soft_cross_entropy.draw(12, 24, 50, dtype, "cpu")
    truth = soft_cross_entropy.float64_reference(teacher, inputs)
    assert set(truth) == set(soft_cross_entropy.RESULTS)
    implementations = compared(dtype, teacher)
    names = [each.name for each in implementations]
    assert names[0] == measure.OURS and measure.BOUND in names and len(set(names)) == len(names)
    assert_all_compute(implementations, inputs, truth, tolerance)


def test_the_teacher_changes_the_loss():
    inputs = soft_cross_entropy.draw(12, 24, 50, "fp32", "cpu")
    with_, without = (
        soft_cross_entropy.float64_reference(teacher, inputs) for teacher in (True, False)
    )
    assert not torch.allclose(with_["loss"], without["loss"])


@pytest.mark.parametrize("teacher", [True, False])
def test_the_floor_does_exactly_the_matmuls_it_names(teacher):
    call = soft_cross_entropy.matmuls(teacher, soft_cross_entropy.draw(12, 24, 50, "fp32", "cpu"))
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == (3 + teacher) * 2 * 12 * 24 * 50


def test_a_compiled_peer_is_told_apart():
    implementations, _ = soft_cross_entropy.implementations("bf16", "cpu", True, compile_=True)
    assert [each.name for each in implementations if each.compiled] == ["eager autocast compiled"]


@pytest.mark.parametrize("flags", [["--rows", "-1"], ["--width", "0"], ["--dtype", "int8"]])
def test_wrong_flags_end_with_a_message(flags, capsys):
    with pytest.raises(SystemExit):
        soft_cross_entropy.parse(flags)
    assert flags[0] in capsys.readouterr().err


def test_the_gradients_memory_is_that_of_three_tensors():
    row = functools.partial(dict, shape={"m": 10, "d": 4, "v": 7})
    assert soft_cross_entropy.gradient_mb(row(dtype="fp32")) == pytest.approx(
        4 * (10 * 4 + 7 * 4 + 7) / 1e6
    )
    assert soft_cross_entropy.gradient_mb(row(dtype="bf16")) == pytest.approx(
        (2 * 10 * 4 + 4 * (7 * 4 + 7)) / 1e6
    )


def test_a_quick_run_writes_every_row(tmp_path, capsys):
    sizes = ["--rows", "6", "--width", "16", "--vocabulary", "40", "--dtype", "fp32"]
    meta, rows = quick_rows(soft_cross_entropy.main, tmp_path / "run.json", *sizes)
    assert {"liger-kernel", "cut-cross-entropy", "torch.compile"} <= missing_names(meta)
    for teacher in (True, False):
        shape = {"m": 6, "d": 16, "v": 40, "teacher": teacher}
        group = {row["impl"]: row for row in rows if row["shape"] == shape}
        assert set(group) == {each.name for each in compared("fp32", teacher, quick=True)}
        for name, row in group.items():
            assert (row["op"], row["phase"]) == ("soft_cross_entropy", "fwd+bwd")
            assert row["dtype"] == "fp32"
            assert (row["peak_mb"] is None) == (name == measure.BOUND)
    assert len(rows) == sum(len(compared("fp32", teacher, True)) for teacher in (True, False))
    printed = capsys.readouterr().out
    assert "with teacher" in printed and "of eager" in printed and "of floor" in printed
