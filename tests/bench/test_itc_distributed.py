import json
import subprocess
import sys
from pathlib import Path

import itc_distributed
import pytest
import torch
from _harness import ranks
from _harness.measure import Settings
from baselines.contrastive import traffic as distributed_traffic
from baselines.contrastive.projection import CountedMatmuls, Rates, project
from fastvlp_tests import exchanges
from fastvlp_tests.bench_runs import BRIEF
from hypothesis import given
from hypothesis import strategies as st

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module", params=[2, 3])
def counted(request):
    return ranks.launch(request.param, exchanges.count_each, timeout_s=60)


@pytest.mark.parametrize("name", exchanges.EXCHANGES)
def test_every_exchange_counts_what_its_ring_sends(counted, name):
    for rank, found in enumerate(counted):
        assert found[name] == pytest.approx(exchanges.expected(name, rank, len(counted)), abs=1)


def test_every_exchange_that_torch_has_is_known():
    names = distributed_traffic.loaded("c10d") - distributed_traffic._NO_EXCHANGE
    assert names and names <= set(distributed_traffic._RULES)


def test_no_more_is_counted_than_the_loopback_carries():
    found = ranks.launch(2, exchanges.seen_on_loopback, 1024, timeout_s=60)
    assert [counted for _, counted in found] == [4 * 1024**2] * 2
    assert all(carried >= 2 * 4 * 1024**2 for carried, _ in found)


def test_a_listener_hears_nothing_once_closed():
    heard = []
    x = torch.ones(2, 2)
    with distributed_traffic.Listener("aten", ["mm"], lambda name, _: heard.append(name)):
        assert torch.equal(x @ x, torch.full((2, 2), 2.0))
    x @ x
    assert heard == ["mm"]


def test_a_rank_that_fails_ends_all_and_is_named():
    with pytest.raises(RuntimeError, match="rank 1 of 2: (?s:.*)rank 1 gives up"):
        ranks.launch(2, exchanges.fail_on, 1, timeout_s=60)


def test_a_rank_that_vanishes_is_named():
    with pytest.raises(RuntimeError, match=r"rank [01] of 2: its process ended with exit code 3"):
        ranks.launch(2, exchanges.leave, timeout_s=60)


def test_a_call_takes_as_long_as_on_the_slowest_rank():
    first, second = ranks.launch(2, exchanges.take_turns, 3, timeout_s=60)
    assert first == second
    assert set(first) == {"a", "b"} and all(len(times) == 3 for times in first.values())
    assert min(first["a"] + first["b"]) >= 10


@pytest.fixture(scope="module")
def errors():
    """By dtype: of each rank the errors of the whole gradient and of the local one."""
    dtypes = ("fp32", "bf16")
    jobs = [itc_distributed.Job(Settings(), dtype, 2, 32, 16, 20.0, 32) for dtype in dtypes]
    found = ranks.launch(2, exchanges.errors_of, jobs, timeout_s=60)
    return dict(zip(dtypes, zip(*found, strict=True), strict=True))


@pytest.mark.parametrize("dtype, limit", [("fp32", 1e-5), ("bf16", 5e-2)])
def test_errors_tell_a_right_gradient_from_a_local_one(errors, dtype, limit):
    assert len(errors[dtype]) == 2
    for right, wrong in errors[dtype]:
        assert set(right) == {"loss", "d_image", "d_text", "d_scale"}
        assert max(right[name] for name in ("loss", "d_image", "d_text")) < limit
        assert wrong["loss"] < limit < 0.1 < wrong["d_image"]


def test_matmuls_of_torch_are_counted():
    a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7)
    with CountedMatmuls() as counter:
        (a @ b).sum().backward()
        torch.addmm(torch.ones(7), torch.ones(3, 5), b)
        torch.ones(2, 3, 5) @ torch.ones(2, 5, 7)
        torch.baddbmm(torch.ones(2, 3, 7), torch.ones(2, 3, 5), torch.ones(2, 5, 7))
    assert counter.flops == (2 + 1 + 2 + 2) * 2 * 3 * 5 * 7


@pytest.mark.parametrize("workspace_bytes, least, most", [(1 << 26, 3.0, 3.0), (1 << 18, 3.5, 4.0)])
def test_our_matmuls_are_counted_with_what_is_computed_again(workspace_bytes, least, most):
    from fastvlp.ops import contrastive

    n, d = 1024, 16
    image, text = torch.randn(2, n, d, requires_grad=True)
    with CountedMatmuls() as counter:
        contrastive(image, text, 5.0, workspace_bytes=workspace_bytes).backward()
    assert least <= counter.flops / (2 * n * n * d) <= most


def row(impl, world_size, matmuls, sent, batch=4096, dim=512):
    return {
        "impl": impl,
        "dtype": "bf16",
        "flops": matmuls * 2 * batch**2 * world_size * dim,
        "bytes_sent": sent,
        "shape": {"world_size": world_size, "batch": batch, "dim": dim},
    }


def test_a_projection_is_the_formula_it_states():
    # Six matmuls and two towers gathered and scattered in bf16.
    shard = 4096 * 512 * 2
    rows = [row("open_clip", w, 6, 4 * (w - 1) * shard) for w in (1, 2, 4)]
    (found,) = project(rows, Rates(matrix_tflops=400, link_gbs=50), [64])
    compute = 6 * 2 * 4096**2 * 64 * 512 / 400e12 * 1e3
    transfer = 4 * 63 * shard / 50e9 * 1e3
    assert found["kind"] == "projection" and found["world_size"] == 64
    assert found["compute_ms"] == pytest.approx(compute)
    assert found["transfer_ms"] == pytest.approx(transfer)
    assert found["exposed_ms"] == pytest.approx(compute + transfer)
    assert found["overlapped_ms"] == pytest.approx(max(compute, transfer))


def test_a_projection_of_ours_keeps_no_logits():
    rows = [row("fastvlp ring", w, 4 - 2 / w, 0) for w in (2, 4)]
    (found,) = project(rows, Rates(), [512])
    assert found["flops"] == 4 * 2 * 4096**2 * 512 * 512


@given(st.integers(0, 10**7), st.integers(1, 10**8), st.integers(2, 4096))
def test_counts_at_two_sizes_give_every_exchange(start, slope, world_size):
    rows = [row("fastvlp", w, 3, start + slope * w) for w in (2, 4)]
    (found,) = project(rows, Rates(), [world_size])
    assert found["bytes_sent"] == pytest.approx(start + slope * world_size)


def test_one_size_is_not_enough_for_a_projection():
    with pytest.raises(ValueError, match="fastvlp bf16: needs counts at two"):
        project([row("fastvlp", w, 3, 0) for w in (1, 2)], Rates())


@pytest.mark.parametrize(
    "flags",
    [
        ["--world-sizes", "0"],
        ["--world-sizes", "1,2", "--project"],
        ["--dtype", "int8"],
        ["--batch", "-1"],
        ["--link-gbs", "0"],
    ],
)
def test_wrong_flags_end_with_a_message(flags, capsys):
    with pytest.raises(SystemExit):
        itc_distributed.parse(flags)
    assert flags[0] in capsys.readouterr().err


def test_a_small_run_writes_every_row(tmp_path):
    target = tmp_path / "distributed.json"
    command = [sys.executable, str(BENCH / "itc_distributed.py"), *BRIEF, "--dtype", "fp32"]
    done = subprocess.run(
        [*command, "--batch", "64", "--dim", "32", "--json", str(target)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(target.read_text())
    rows = {each["impl"]: each for each in document["rows"]}
    assert set(rows) == {"fastvlp", "fastvlp ring", "fastvlp bf16 sent", "open_clip"}
    shard = 64 * 32 * 4
    for each in rows.values():
        assert each["op"] == "contrastive_distributed" and each["phase"] == "fwd+bwd"
        assert each["shape"] == {"world_size": 2, "batch": 64, "dim": 32}
        assert each["ms"] > 0 and each["peak_mb"] is not None
        # bfloat16 keeps eight bits of what it carries; a float32 logit near 100 is off by 2^-18,
        # which exp makes a relative error, and open_clip's sums of 32 terms may be luckier.
        rounded = "bf16" in each["impl"]
        assert each["error"] <= (2**-7 if rounded else 2 * rows["open_clip"]["error"] + 2**-18)
    assert rows["open_clip"]["bytes_sent"] == 4 * shard
    assert rows["open_clip"]["flops"] == 6 * 2 * 64 * 128 * 32
    assert shard < rows["fastvlp bf16 sent"]["bytes_sent"] < rows["fastvlp"]["bytes_sent"]
    assert 2 * shard < rows["fastvlp ring"]["bytes_sent"] < 3 * shard
    assert document["meta"]["projection"]["rows"] == []
    assert "against open_clip" in done.stdout
