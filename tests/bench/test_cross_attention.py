import functools
import json
import subprocess
import sys
from pathlib import Path

import cross_attention
import pytest
import torch
from _harness import measure
from baselines.cross_attention import attention, fusion_layer
from baselines.cross_attention import inputs as attention_inputs
from baselines.cross_attention.inputs import PARTS, Case
from fastvlp_tests.bench_runs import BRIEF
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from torch.utils.flop_counter import FlopCounterMode

BENCH = Path(__file__).parents[2] / "bench"
SMALL = Case(images=3, heads=2, dim=8, keys=20, queries=7)
FIELDS = {"op", "impl", "dtype", "shape", "phase", "ms", "peak_mb", "error"}


def case(part="cross", **changes):
    return Case(**(vars(SMALL) | {"part": part, "queries": 30 if part != "cross" else 7} | changes))


def results(implementations, inputs):
    """What every implementation that runs uncompiled computes, by its name."""
    found = {}
    for implementation in implementations:
        if implementation.bound or implementation.compiled:
            continue
        result = implementation.make(inputs)()
        found[implementation.name] = (
            implementation.unify(inputs, result) if implementation.unify else result
        )
    return found


def assert_all_as_accurate(found, eager, truth):
    """Every implementation is as accurate as the one called `eager`."""
    for name, result in found.items():
        assert set(result) == set(truth)
        for part, exact in truth.items():
            # A bias of the keys moves all logits of a row alike: its gradient is zero, and that of
            # the queries' bias has the size of the terms that cancel in it.
            size = truth[part.replace("key.bias", "query.bias")].norm().item()
            floor = epsilon(torch.float32) * size
            label = f"{name}: {part}"
            assert_as_accurate(label, result[part], found[eager][part], exact, floor=floor)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_every_implementation_computes_the_same(part, mask, backward):
    measured = case(part, mask=mask)
    inputs = attention_inputs.draw(measured)
    truth = attention_inputs.float64_reference(backward, inputs)
    assert set(truth) == ({"out", "d_q", "d_k", "d_v"} if backward else {"out"})
    implementations, _ = attention.implementations(measured, backward)
    assert_all_as_accurate(results(implementations, inputs), "eager, heads first", truth)


def test_inputs_are_the_same_each_time_and_as_long_as_told():
    ragged = case("ragged", queries=90)
    one, other = attention_inputs.draw(ragged), attention_inputs.draw(ragged)
    assert torch.equal(one.q, other.q) and one.q_lengths == other.q_lengths
    assert all(3 * 5 <= length <= 90 for length in one.q_lengths)
    assert len(one.q) == sum(one.q_lengths) == int(one.cu_q[-1])
    mask = attention_inputs.draw(case(mask=True)).key_mask
    assert mask[:, 0].all() and not mask.all(1).any()


def test_padding_and_packing_are_inverse():
    lengths, rows = (3, 0, 5), torch.randn(8, 2, 4)
    padded = attention_inputs.pad(rows, lengths)
    assert padded.shape == (3, 5, 2, 4) and not padded[1].any()
    assert torch.equal(padded[attention_inputs.filled(lengths)], rows)


@pytest.mark.parametrize("names", [("S", "O"), ("S", "O", "dV", "dP", "dQ", "dK", "S")])
def test_the_floor_does_exactly_the_matmuls_it_names(names):
    inputs = attention_inputs.draw(SMALL)
    call = attention.matmuls(names, inputs)
    with FlopCounterMode(display=False) as counter:
        call()
    expected = len(names) * 1e9 * attention_inputs.work(inputs)["gflop_per_matmul"]
    assert counter.get_total_flops() == pytest.approx(expected)


@pytest.mark.parametrize("part", PARTS)
def test_implementations_have_names_of_their_own_and_absent_ones_a_reason(part):
    for backward in (False, True):
        found, missing = attention.implementations(case(part), backward)
        names = [each.name for each in found]
        assert names[0] == measure.OURS and len(set(names)) == len(names)
        absent = {each.name: each for each in missing}
        assert {"flash-attn", "xformers"} <= set(absent)
        assert all("pip install" in absent[name].remedy for name in ("flash-attn", "xformers"))
        assert ("flex_attention" in absent) == backward
        assert ("sdpa, heads first" in names) == (part != "self")
        assert ("fastvlp, heads first" in names) == (part != "self")
    dropped, missing = attention.implementations(case(part, dropout=0.1), True)
    assert "flex_attention" in {each.name for each in missing}


def test_the_summary_names_the_best_peers_and_the_bounds():
    def row(impl, ms, **extra):
        shared = {"op": "cross_attention", "dtype": "fp32", "shape": {"queries": 30}}
        return shared | {"impl": impl, "phase": "fwd", "ms": ms} | extra

    text = cross_attention.summary(
        [
            row("fastvlp", 10.0),
            row("floor", 8.0, matmuls=6),
            row("fastvlp, heads first", 5.0),
            row("sdpa, heads first", 20.0),
            row("sdpa, tokens first", 40.0),
            row("eager, tokens first", 30.0),
            row("flash-attn", None),
        ]
    )
    tokens, heads = text.split("\n")[1:]
    assert "fastvlp 10.0 ms, 2.00x as fast as sdpa, heads first, 3.00x as fast as eager, " in tokens
    assert "fastvlp, heads first 5.0 ms, 4.00x as fast as sdpa, heads first, 160%" in heads
    assert "80% of the floor of 6 matmuls" in tokens


@pytest.mark.parametrize(
    "flags",
    [
        ["--queries", "0"],
        ["--dtype", "int8"],
        ["--part", "half"],
        ["--dropout", "1"],
        ["--dim", "0"],
    ],
)
def test_wrong_flags_end_with_a_message(flags, capsys):
    with pytest.raises(SystemExit):
        cross_attention.parse(flags)
    assert flags[0] in capsys.readouterr().err


def bench(tmp_path, *flags):
    target = tmp_path / "attention.json"
    command = [sys.executable, str(BENCH / "cross_attention.py"), *BRIEF, "--no-compile"]
    command += ["--json", str(target), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    assert found["meta"]["threads"] == 1
    assert all(FIELDS <= set(row) and row["ms"] > 0 for row in found["rows"])
    return found, done.stdout


def test_a_quick_run_writes_every_row(tmp_path):
    sizes = ["--images", "2", "--heads", "2", "--dim", "8", "--keys", "20", "--queries", "6"]
    found, printed = bench(tmp_path, *sizes, "--dtype", "bf16", "--part", "cross,self")
    for part in ("cross", "self"):
        measured = case(part, images=2, queries=6, dtype="bf16")
        rows = {row["impl"]: row for row in found["rows"] if row["op"] == measured.op()}
        expected, _ = attention.implementations(measured, True)
        assert set(rows) == {each.name for each in expected if not each.compiled}
        for name, row in rows.items():
            bound = name.startswith(measure.BOUND)
            assert row["shape"] == measured.shape() and row["phase"] == "fwd+bwd"
            assert (row["error"] is None) == bound and (row["peak_mb"] is None) == bound
    assert {"flash-attn", "xformers"} <= {each["name"] for each in found["meta"]["missing"]}
    assert len(found["meta"]["work"]) == 2 and "pip install" in printed


@pytest.mark.parametrize("random_lengths", [False, True])
def test_every_layer_computes_the_same(random_lengths):
    measured = fusion_layer.LayerCase(2, 9, "fp32", random_lengths, "cpu", width=24, heads=3)
    inputs = fusion_layer.draw(measured)
    truth = fusion_layer.reference(inputs)
    assert {"out", "d_text", "d_images"} < set(truth)
    implementations = fusion_layer.implementations()
    assert all(each.make(inputs)() is None for each in implementations if each.bound)
    assert_all_as_accurate(results(implementations, inputs), "BertLayer, eager", truth)


def test_dropout_and_forward_alone(tmp_path):
    sizes = ["--images", "2", "--heads", "2", "--dim", "8", "--keys", "20", "--queries", "6"]
    flags = ["--dropout", "0.1", "--mask", "--phase", "fwd", "--part", "cross", "--no-memory"]
    found, _ = bench(tmp_path, *sizes, *flags)
    assert {row["op"] for row in found["rows"]} == {"cross_attention, key mask, dropout"}
    assert all(row["error"] is None and row["peak_mb"] is None for row in found["rows"])


def test_inputs_and_implementations_can_be_sent_to_another_process():
    import pickle

    implementations, _ = attention.implementations(case(), True)
    made = [
        functools.partial(attention_inputs.draw, case()),
        *(each.make for each in implementations),
    ]
    assert len(pickle.loads(pickle.dumps(made))) == len(made)
