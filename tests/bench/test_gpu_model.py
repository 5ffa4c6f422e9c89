"""bench/gpu_model.py and the model under it: rules, scaling, ranks, and the quick run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _gpu import occupancy, schedule
from _gpu.chips import A100, CHIPS, H100
from _gpu.schedule import TracedStep
from fastvlp_tests import gpu_model_child as child
from fastvlp_tests import triton_process
from ptx_machine import cuda_library

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def pool():
    """A process in which Triton compiles."""
    with triton_process.start(interpret=False, workers=1) as started:
        yield started


# Warps, registers, bytes of shared memory -> blocks, by CUDA's occupancy calculator.
@pytest.mark.parametrize(
    "chip, warps, registers, shared, blocks, limit",
    [
        (H100, 8, 32, 0, 8, "warps"),
        (H100, 1, 32, 0, 32, "blocks"),
        (H100, 4, 64, 0, 8, "registers"),
        (H100, 4, 168, 0, 3, "registers"),
        (H100, 8, 255, 0, 1, "registers"),
        (H100, 4, 33, 0, 12, "registers"),
        (H100, 4, 32, 73728, 3, "shared memory"),
        (H100, 4, 32, 227 << 10, 1, "shared memory"),
        (A100, 4, 32, 73728, 2, "shared memory"),
        (A100, 4, 32, 48 << 10, 3, "shared memory"),
    ],
)
def test_occupancy(chip, warps, registers, shared, blocks, limit):
    found = occupancy.occupancy(chip, warps, registers, shared)
    assert (found.blocks, found.limited_by) == (blocks, limit)


@pytest.mark.parametrize(
    "warps, registers, shared, what",
    [(32, 65, 0, "registers"), (4, 32, (227 << 10) + 1, "shared memory")],
)
def test_a_block_that_does_not_fit_is_refused(warps, registers, shared, what):
    with pytest.raises(ValueError, match=f"does not fit H100 SXM: too much for {what}"):
        occupancy.occupancy(H100, warps, registers, shared)


def test_each_block_has_its_share_of_l1():
    """Three blocks by registers share 256 KiB; of each, shared memory and a KiB are taken."""
    assert occupancy.l1_share(H100, 4, 168, 0) == (256 << 10) // 3 - 1024
    assert occupancy.l1_share(H100, 4, 168, 1000) == (256 << 10) // 3 - 2048
    assert occupancy.l1_share(A100, 4, 32, 73728) == (192 << 10) // 2 - 73728 - 1024


def test_chips_agree_with_their_datasheets():
    """Matmuls of bf16 in TFLOP/s, from multiprocessors, rate and clock."""
    for name, tflops in {"h100": 989.4, "h200": 989.4, "a100": 312.0, "b200": 2250.0}.items():
        chip = CHIPS[name]
        peak = chip.tensor["bf16"] * chip.sms * chip.boost_ghz / 1e3
        assert peak == pytest.approx(tflops, rel=3e-3)


WGMMA = "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16"
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"


def test_clocks_of_matrix_instructions():
    assert schedule.matrix_clocks(H100, WGMMA) == 128
    assert schedule.matrix_clocks(A100, MMA) == 2
    assert schedule.matrix_clocks(H100, MMA) == pytest.approx(1 / 0.63)
    tf32 = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    assert schedule.matrix_clocks(A100, tf32) == 2


def test_clocks_of_pipes():
    counts = {"fma.rn.f32": 40, "ex2.approx.ftz.f32": 6, "mov.b32": 99, "add.s64": 8,
              "fma.rn.bf16x2": 4, "div.full.f32": 2, MMA: 5, "ld.global.b32": 7}  # fmt: skip
    pipes = {"fma.rn.f32": "fma", "ex2.approx.ftz.f32": "mufu", "mov.b32": "move",
             "add.s64": "alu", "fma.rn.bf16x2": "fma", "div.full.f32": "alu", MMA: "tensor",
             "ld.global.b32": "memory"}  # fmt: skip
    found = schedule.pipe_clocks(A100, counts, pipes)
    assert found["fma"] == (40 + 2 * 2) * 32 / 64
    assert found["mufu"] == (6 + 2) * 32 / 16
    assert found["alu"] == (8 * 2 + 2 * 2) * 32 / 64
    assert found["half2"] == 4 * 32 / 128
    assert found["tensor"] == 5 * 2
    assert found["issue"] == (40 + 6 + 16 + 4 + 2 * 5 + 5 + 7) / 4


def fma(result, *operands):
    return TracedStep("fma.rn.f32", "fma", operands, (result,))


def clocks(*steps, warps=4, chip=A100):
    return schedule.block_clocks(chip, steps, warps, memory_latency=400)


def test_dependent_instructions_wait_and_others_do_not():
    """A warp's FMA takes 2 clocks of a quarter of an A100's lanes, its result 4 more."""
    assert clocks(fma(1, 0), fma(2, 1), fma(3, 2)) == 3 * 6
    assert clocks(fma(1, 0), fma(2, 0), fma(3, 0)) == 3 * 2 + 4
    assert clocks(fma(1, 0), fma(2, 0), warps=16) == 2 * 8 + 4


def test_loads_hide_behind_what_does_not_need_them():
    load = TracedStep("ld.global.b32", "memory", (0,), (1,))
    assert clocks(load, fma(2, 0)) == 404
    assert clocks(load, fma(2, 1)) == 410


def test_waits_and_barriers_hold_back_what_follows():
    copy = TracedStep("cp.async.cg.shared.global", "memory", (0,), ())
    commit = TracedStep("cp.async.commit_group", "control", (), ())
    wait = TracedStep("cp.async.wait_group", "control", (), (), 0)
    one_left = TracedStep("cp.async.wait_group", "control", (), (), 1)
    arrives = 16 + 400
    assert clocks(copy, commit, wait, fma(1, 0)) == arrives + 6
    assert clocks(copy, commit, copy, commit, one_left, fma(1, 0)) == max(arrives + 6, 32 + 400)
    barrier = TracedStep("bar.sync", "barrier", (), ())
    assert clocks(fma(1, 0), barrier, fma(2, 0)) == 20 + 6


def test_matrix_units_run_while_a_warpgroup_goes_on():
    matmul = TracedStep(WGMMA, "tensor", (7,), (7,))
    commit = TracedStep("wgmma.commit_group", "control", (), ())
    wait = TracedStep("wgmma.wait_group", "control", (), (), 0)
    alone = clocks(matmul, matmul, commit, wait, chip=H100)
    assert alone == 2 * 128 + 32
    assert clocks(matmul, matmul, commit, fma(1, 0), wait, chip=H100) == alone
    assert clocks(matmul, matmul, commit, wait, fma(1, 0), chip=H100) == alone + 1 + 4


def test_a_profile_is_scaled_to_what_execution_gives(pool):
    scaled, executed, binary = pool.submit(child.scaled_and_executed).result()
    # Sectors, matrix and shared-memory work are linear in the trips of the loop, to the last bit.
    for pipe in ("tensor", "shared memory", "L2 port", "issue", "alu"):
        assert scaled["clocks"][pipe] == pytest.approx(executed["clocks"][pipe], rel=1e-9)
    assert scaled["sector_bytes"] == executed["sector_bytes"] == 32 * (2 * 64 * 256 + 64 * 64) / 16
    assert scaled["latency"] == pytest.approx(executed["latency"], rel=0.1)
    assert executed["touched"] == 1.0
    assert binary["warps"] == 4 and binary["registers"] > 16 and binary["stack_bytes"] == 0


def test_one_size_is_enough_where_blocks_are_equal(pool):
    scaled, executed, errors = pool.submit(child.of_one_size).result()
    assert scaled == executed and scaled["sector_bytes"] == 4 * 2 * 1024
    assert errors == [
        "other runs at 8 and not at sizes (2,)",
        "softmax_kernel has other tiles at sizes (2,) than at 8: {'BLOCK': [1024, 2048]}",
    ]


def test_tiles_may_differ_in_the_size_itself(pool):
    tiles = [{"warps": 4, "N": n, "BLOCK": min(n, 512)} for n in (512, 1024, 8192)]
    assert pool.submit(child.differences, tiles, (512, 1024, 8192)).result() == {}
    tiles[0]["BLOCK"] = 256
    found = pool.submit(child.differences, tiles, (512, 1024, 8192)).result()
    assert found == {"BLOCK": [256, 512, 512]}


def test_a_small_size_is_executed_with_the_tiles_of_the_true_one(pool):
    """Blocks of cross-attention, and warps of each, with as many multiprocessors as images."""
    true, small = pool.submit(child.attention_launches).result()
    assert true == [("attention_kernel", 768, 4), ("fused_gradient_kernel", 384, 8)]
    assert small == [("attention_kernel", 24, 4), ("fused_gradient_kernel", 12, 8)]


def test_bounds_follow_waves_and_the_slowest_part(pool):
    def bound(**changes):
        return pool.submit(child.bound_of, **changes).result()

    ms, parts, blocks, waves = bound()
    assert blocks == 8 and waves == pytest.approx(1 / 8)
    # One block on every multiprocessor: 1,830 clocks at 1.83 GHz, behind the launch.
    assert parts["fma"] == pytest.approx(1e-3) and ms == pytest.approx(3.5e-3)
    assert bound(blocks=133)[1]["fma"] == pytest.approx(2e-3)
    assert bound(latency=5490.0)[0] == pytest.approx(5.5e-3)
    # Nine blocks where eight fit: two rounds of the latency.
    assert bound(blocks=132 * 9)[1]["latency"] == pytest.approx(2e-4)
    assert bound(bytes=1 << 40)[1]["memory"] == pytest.approx(132 * 3200 / (3.35e12 * 0.92) * 1e3)


def test_bytes_from_memory(pool):
    def found(*args):
        return pool.submit(child.memory_bytes, *args).result()

    fits, large = 40e6, 400e6
    assert found(10 * fits, fits, 1000, 100) == fits
    # Ten waves of 100 blocks, each of a square patch of ten blocks' rows and as many columns.
    assert found(4000e6, large, 1000, 100) == 10 * 10 * 4e6
    # A kernel that streams reads nothing twice.
    assert found(large, large, 1000, 100) == large


def test_operations_of_torch_are_recorded_without_views(pool):
    fake, wide, dry, result = pool.submit(child.recorded).result()
    assert fake == [
        ("matmul", 2 * (64 * 128 + 128 * 32 + 64 * 32), 2 * 64 * 128 * 32),
        ("relu", 2 * 2 * 64 * 32, 0),
    ]
    assert dry == 2
    # Wider results, and what a matmul is added to.
    one = 2 * 4 * 8 * 2
    assert wide == [
        ("matmul", 2 * (32 + 16) + 4 * 8, one), ("matmul", 4 * (32 + 16) + 2 * 4 * 8, one),
    ]  # fmt: skip
    assert result.dtype == torch.float32 and (result == 16).all()


def test_operators_of_fastvlp_are_recorded_as_what_they_are_made_of(pool):
    """Soft cross entropy: two matmuls of logits in fp32, a pass, and three of gradients in fp32,
    the last of which, with respect to the bias, has 16 columns."""
    launches, matmuls = pool.submit(child.soft_cross_entropy_launches).result()
    m, d, v = 300, 64, 1000
    assert launches == [m]
    assert matmuls == [
        *[(2 * (m * d + v * d) + 4 * m * v, 2 * m * d * v)] * 2,
        (2 * (m * v + v * d) + 4 * m * d, 2 * m * d * v),
        (2 * (m * v + m * d) + 4 * v * d, 2 * m * d * v),
        (2 * (m * v + 16 * m) + 4 * 16 * v, 2 * m * 16 * v),
    ]


UPDATE = (
    "_ZN7fastvlp4cuda38_GLOBAL__N__4d2ab1ce_6_ema_cu_9f2c0b7710update_emaILi4EEEvNS0_9TableViewE"
)
REPORT = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{UPDATE}' for 'sm_90'
ptxas info    : Function properties for {UPDATE}
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function '_ZN7fastvlp4cuda10clear_lastEPl' for 'sm_90'
ptxas info    : Function properties for _ZN7fastvlp4cuda10clear_lastEPl
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def test_resources_of_kernels_are_those_of_ptxas(pool):
    names = [UPDATE, "_ZN7fastvlp4cuda10clear_lastEPl"]
    found, readable = pool.submit(child.resources, REPORT, names).result()
    assert found == {names[0]: (40, 16, 1024), names[1]: (8, 0, 0)}
    assert readable == ["update_ema<4>", "clear_last"]


@pytest.fixture
def nvcc():
    try:
        cuda_library.load()
    except cuda_library.Missing as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("adamw, read, written", [(False, 8, 6), (True, 20, 20)])
def test_kernels_of_nvcc_are_launched_and_counted(pool, nvcc, adamw, read, written):
    """Bytes of each element that are read and written; most of them are the same ones."""
    chunk, kernel = 8192, "step_adamw<4>" if adamw else "update_ema<4>"
    held = 24 if adamw else 10
    names, binary, distinct, touched = pool.submit(
        child.ema_launch, adamw, True, 2 * chunk
    ).result()
    assert names == (kernel, 2, 8, held * 2 * chunk)
    assert 16 < binary[0] <= 64 and binary[1] == 0
    assert distinct["write"] == written * 2 * chunk
    # And of the table of tensors.
    assert read * 2 * chunk < distinct["read"] < read * 2 * chunk + 512
    assert touched == pytest.approx((read + written) / held, rel=3e-3)
    # As large as a model, of which nothing is executed.
    names, dry = pool.submit(child.ema_launch, adamw, False, 145 * 10**6).result()
    assert names == (kernel, math.ceil(145e6 / chunk), 8, held * 145 * 10**6) and dry == binary


@pytest.mark.thorough
def test_the_model_ranks_as_published_measurements_do(pool):
    found = pool.submit(child.comparison).result()
    assert [kernel for kernel, *_ in found] == ["matmul fp16", "softmax fp32", "attention fp16"]
    for kernel, times, rates, ratio in found:
        assert times == 1.0 and rates == 1.0, kernel
        # A bound, and no more than twice below what was measured.
        assert 1.0 < ratio < 2.0, kernel


def test_floors_count_the_matmuls_that_gpu_check_counts(pool):
    ours, checked = pool.submit(child.floor_matmuls).result()
    matmuls = {"contrastive": 3, "sigmoid": 3, "cross_attention": 6}
    assert ours == pytest.approx(matmuls) and checked == pytest.approx(matmuls)


def test_a_floor_has_matmuls_at_peak(pool):
    """989 TFLOP/s, whatever share of them the vendor's library reaches; or the bytes."""
    name, ms, limited_by = pool.submit(child.floor, 10**9, 3 * 10**13).result()
    assert (name, limited_by) == ("floor", "matmuls at peak")
    assert ms == pytest.approx(0.0025 + 3e13 / 989.4e9, rel=1e-3)
    _, ms, limited_by = pool.submit(child.floor, 10**11, 10**12).result()
    assert limited_by == "memory" and ms == pytest.approx(0.0025 + 1e11 / (3.35e9 * 0.92))


@pytest.mark.parametrize(
    "error", ["ValueError", "NotImplementedError", "UnknownForm", "ProgramError", "OutOfResources"]
)
def test_what_cannot_be_modelled_is_missing_with_its_reason(pool, error):
    rows, missing = pool.submit(child.compare_raising, error).result()
    assert rows == ["floor"] and len(missing) == 1
    name, reason = missing[0]
    assert name == "fastvlp" and reason.startswith(f"{error}: ")


@pytest.mark.parametrize("error", ["KeyError", "AssertionError", "TypeError"])
def test_a_fault_of_the_model_ends_the_run(pool, error):
    with pytest.raises((KeyError, AssertionError, TypeError)) as fault:
        pool.submit(child.compare_raising, error).result()
    assert fault.type.__name__ == error


@pytest.mark.thorough
def test_quick_run(tmp_path):
    target = tmp_path / "model.json"
    subprocess.run(
        [sys.executable, BENCH / "gpu_model.py", "--quick", "--threads", "1", "--json", target],
        check=True, env={**os.environ, "TRITON_INTERPRET": "0"}, timeout=900,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    found = json.loads(target.read_text())
    meta, rows = found["meta"], found["rows"]
    assert meta["complete"] and "not a time" in meta["model"] and "h100" in meta["chips"]
    assert {row["op"] for row in rows} == {"sigmoid", "soft_cross_entropy"}
    for row in rows:
        assert (row["rounds"], row["ms_q1"], row["ms_q3"]) == (0, None, None)
        assert row["chip"] == "H100 SXM" and "model" in row["phase"]
        assert row["error"] is None and row["peak_mb"] is None and math.isfinite(row["ms"])
    for op in ("sigmoid", "soft_cross_entropy"):
        ms = {row["impl"]: row["ms"] for row in rows if row["op"] == op}
        assert ms["floor"] < ms["fastvlp"] < max(ms.values())
