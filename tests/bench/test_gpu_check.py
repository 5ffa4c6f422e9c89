"""bench/gpu_check.py: dry runs without a GPU, the folder that travels, the floor, the marker."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import torch
from _gpu import check_folder, check_ops
from _gpu.check_worker import is_sticky
from baselines.contrastive.sigmoid import draw, eager, float64_reference, run
from fastvlp_tests.tolerance import assert_as_accurate

BENCH = Path(__file__).parents[2] / "bench"
OPS = {
    "contrastive", "sigmoid_contrastive", "momentum_contrastive", "cross_attention",
    "soft_cross_entropy", "word_patch_alignment", "ema", "adamw_ema",
}  # fmt: skip


def python(folder, *arguments, **variables):
    """A Python process in `folder`, without what the surrounding tests set."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)} | variables
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def travelled(tmp_path_factory):
    """A quick dry run in a folder that holds only what travels: the folder, its cache, the run's
    output and its JSON."""
    home = tmp_path_factory.mktemp("travelled")
    folder, cache, target = home / "folder", home / "cache", home / "found.json"
    check_folder.copy_sources(BENCH.parent, folder)
    done = python(
        folder, "bench/gpu_check.py", "--dry-run", "--quick", "--workers", 1, "--cache", cache,
        "--json", target, "--seconds", 1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, cache, done.stdout, json.loads(target.read_text())


@pytest.mark.thorough
def test_a_dry_run_goes_through_every_stage_where_only_what_travels_is(travelled):
    folder, _, output, found = travelled
    assert check_folder.report_size(folder) == 0
    meta, rows = found["meta"], found["rows"]
    assert meta["complete"] and meta["dry_run"] and not meta["tests"]["trouble"]
    assert meta["libraries"] == "the libraries load"
    assert set(meta["stages"]) == {"libraries", "tests", "measurements"}
    assert not any("error" in stage for stage in meta["stages"].values())
    # One test for each layout and instruction set, and not the test that stays on the CPU.
    assert meta["tests"]["counts"] == {"passed": 7}
    ours = {row["op"]: row for row in rows if row["impl"] == "fastvlp"}
    assert set(ours) == OPS and meta["launches"] > 20
    for op, row in ours.items():
        group = [each for each in rows if each["op"] == op]
        (floor,) = (each for each in group if each["impl"] == "floor, counted")
        assert row["share_of_floor"] == pytest.approx(floor["ms"] / row["ms"])
        assert any(not each["impl"].startswith(("fastvlp", "floor")) for each in group)
    assert "made up" in output and "word_patch_alignment fwd+bwd bf16" in output
    assert not list((folder / "bench").glob("results/*"))


def test_every_source_file_travels(tmp_path):
    root, folder = BENCH.parent, tmp_path / "folder"
    check_folder.copy_sources(root, folder)
    for name in ("bench", "tests", "fastvlp", "csrc", "kernels"):
        there = folder / "fastvlp" / name if name == "kernels" else folder / name
        copied = {path.relative_to(there) for path in there.rglob("*.py")}
        sources = {path.relative_to(root / name) for path in (root / name).rglob("*.py")}
        assert sources - copied == set(), name


@pytest.mark.thorough
def test_a_packed_cache_serves_at_another_place(travelled, tmp_path):
    folder, cache, *_ = travelled
    there = tmp_path / "there"
    there.mkdir()
    archive = there / check_folder.ARCHIVE
    kernels = check_folder.pack_cache(cache, archive)
    assert kernels > 10 and archive.stat().st_size < 10 << 20
    unpacked = check_folder.unpack_cache(there, None)
    before = {path.name for path in unpacked.iterdir()}
    assert len(before) == kernels
    for group in unpacked.glob("*/__grp__*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        assert all(
            Path(path).exists() and unpacked in Path(path).parents for path in paths.values()
        )
    # The first comparison again: what it launches is all there.
    lines = tmp_path / "lines"
    done = python(
        folder, "-m", "_gpu.check_measure", "--quick", "--dry-run", "--out", lines,
        "--seconds", 0.1, "--ceilings", json.dumps({"copy_gb_s": 1, "matmul_bf16_tflop_s": 1}),
        TRITON_CACHE_DIR=str(unpacked), PYTHONPATH="bench",
    )  # fmt: skip
    entries = [json.loads(line) for line in lines.read_text().splitlines()]
    assert done.returncode == 0, done.stderr
    assert any(row["op"] == "contrastive" for each in entries for row in each.get("rows", []))
    assert {"out of time"} <= {m["reason"] for each in entries for m in each.get("missing", [])}
    assert {path.name for path in unpacked.iterdir()} == before


def test_tests_past_the_deadline_are_named_and_known_ones_not_run_again(tmp_path):
    lines = tmp_path / "lines"
    known = "tests/ops/packing/test_packing.py::test_a_pad_of_an_earlier_process"
    lines.write_text(json.dumps({"test": known, "outcome": "unfinished"}) + "\n")

    def run(share):
        done = python(
            BENCH.parent, "-m", "pytest", "-q", "-p", "_gpu.check_worker", "-m", "gpu",
            "--gpu-results", lines, "--gpu-deadline", time.time() - 1, "--gpu-share", share,
            "tests/ops/packing/test_packing.py", PYTHONPATH=str(BENCH),
        )  # fmt: skip
        assert done.returncode in (0, 5), done.stdout + done.stderr
        return [json.loads(line) for line in lines.read_text().splitlines()][1:]

    found = run("1/4")
    assert found and {each["outcome"] for each in found} == {"out of time"}
    assert all(each["test"].startswith("tests/ops/packing/test_packing.py::") for each in found)
    names = [each["test"] for each in run("0/1")]
    assert len(names) == len(set(names)) > len(found)


DRY_RUNS = {
    "lists and numbers": """
        starts = torch.tensor([[0, 3], [5, 9]], device='cuda')
        large = torch.empty(1, dry_device.LARGE + 1, device='cuda')[:, :2]
        print(starts.device, starts.tolist(), starts[1].tolist(), large.tolist())
        print(large.sum().item())
    """,
    "plan": """
        from fastvlp.ops import contrastive
        x = torch.ones(1000, 65, dtype=torch.bfloat16, device='cuda')
        print(contrastive(x, x, 1.0, workspace_bytes=1).shape, len(device.launches) > 1)
    """,
    "driver": """
        x = torch.arange(6.0, dtype=torch.bfloat16).reshape(2, 3).to('cuda')
        y = x.clone()
        print(x.data_ptr() != y.data_ptr(), x.data_ptr() == x[:1].data_ptr())
        print(torch.mm(x, x.mT, out_dtype=torch.float32).dtype)
        print(torch.ones(3).pin_memory().to('cuda', non_blocking=True).device)
        torch.cuda.set_rng_state(torch.cuda.get_rng_state('cuda'), 'cuda')
        large = torch.empty(dry_device.LARGE + 1, device='cuda')
        print(len(large[large > 5]), len(x[x > 3]))
        file = io.BytesIO()
        torch.save(x, file)
        file.seek(0)
        print(torch.load(file).tolist())
    """,
}
# Prints by name what each of these prints, or the error that ends it.
RUN_DRY = """
import contextlib, io, json, sys, textwrap, traceback
import torch
from _gpu import dry_device

found = {}
for name, code in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            with dry_device.DryDevice() as device:
                exec(textwrap.dedent(code), globals() | {"device": device})
        except Exception:
            traceback.print_exc(file=printed)
    found[name] = printed.getvalue()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def printed():
    """What each of DRY_RUNS prints, one after another in a process, `device` being a dry one."""
    path = os.pathsep.join([str(BENCH), str(BENCH.parent)])
    done = python(BENCH.parent, "-c", RUN_DRY, json.dumps(DRY_RUNS), PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tensors_of_a_dry_run_become_lists_and_numbers(printed):
    assert printed["lists and numbers"] == "cuda:0 [[0, 3], [5, 9]] [5, 9] [[0.0, 0.0]]\n0.0\n"


def test_a_dry_run_does_not_hand_the_plan_of_the_gpu_to_the_cpu(printed):
    assert printed["plan"] == "torch.Size([]) True\n"


def test_a_dry_run_does_what_needs_a_driver_or_values(printed):
    assert printed["driver"].splitlines() == [
        "True True", "torch.float32", "cuda:0", "0 2", "[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]",
    ]  # fmt: skip


def test_a_dry_run_of_a_checked_operator_compiles_what_it_launches(tmp_path):
    lines, checked = tmp_path / "lines", "tests/ops/contrastive/test_arguments.py"
    done = python(
        BENCH.parent, "-m", "pytest", "-q", "-p", "_gpu.check_worker", "-p", "no:cacheprovider",
        "--device", "cuda", "--gpu-dry", "--assert=plain", "--gpu-results", lines, checked,
        "-k", "opcheck and dtype1", PYTHONPATH=str(BENCH), PYTHONOPTIMIZE="1",
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = {path.stem for path in (tmp_path / "cache").glob("*/*.cubin")}
    kinds = ("statistics", "gradient", "sigmoid")  # of the three operators that are checked
    assert all(any(kind in name for name in compiled) for kind in kinds), compiled


def test_a_lost_process_of_the_tests_is_replaced(tmp_path):
    lines, log = tmp_path / "lines", tmp_path / "log"
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, signal, sys\n"
        "path = sys.argv[sys.argv.index('--gpu-results') + 1]\n"
        "count = open(path, 'a+').write('x') and os.path.getsize(path)\n"
        "sys.exit(3) if count == 1 else None\n"
        "os.kill(os.getpid(), signal.SIGKILL) if count == 2 else None\n"
    )
    share = gpu_check.Share([sys.executable, str(script)], [], dict(os.environ), lines, log)
    while share.is_running():
        time.sleep(0.02)
    assert share.starts == 3 and share.process.returncode == 0


@pytest.mark.parametrize(
    "message",
    [
        "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
        "RuntimeError: Triton Error [CUDA]: an illegal memory access was encountered",
        "RuntimeError: fastvlp's CUDA kernels could not be queued: unspecified launch failure",
    ],
)
def test_a_lost_context_is_recognized(message):
    assert is_sticky(message)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "Triton Error [CUDA]: invalid argument",
        "fastvlp's CUDA kernels could not be queued: out of memory",
        "an illegal memory access",
    ],
)
def test_other_errors_leave_the_context_as_it_is(message):
    assert not is_sticky(message)


def test_a_folder_that_is_too_large_fails(tmp_path, monkeypatch, capsys):
    (tmp_path / "big").write_bytes(bytes(3000))
    monkeypatch.setattr(check_folder, "LIMIT", 2000)
    assert check_folder.report_size(tmp_path) == 1
    assert "too large" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--dry-run", "--json", str(BENCH / "results" / "x.json")],
        ["--seconds", "0"],
        ["--workers", "0"],
    ],
)
def test_flags_that_cannot_be(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu_check.parse(flags)
    assert stop.value.code == 2 and flags[-2] in capsys.readouterr().err


def test_comparisons_cover_every_op_dtype_and_size():
    found = check_ops.comparisons(quick=False)
    seen = {(each.op, each.dtype, each.phase) for each in found}
    for op in OPS - {"ema", "adamw_ema"}:
        for dtype in ("bf16", "fp32", "fp16"):
            assert {(op, dtype, "fwd"), (op, dtype, "fwd+bwd")} <= seen
    assert {each.shape["n"] for each in found if each.op == "contrastive"} == {8192, 32768, 65536}
    assert {("ema", "fp32", "step"), ("adamw_ema", "fp32", "adamw")} <= seen
    # Slow compilation comes after all that is measured in bfloat16 without it.
    compiled = [
        number for number, each in enumerate(found) if any(c.compiled for c in each.implementations)
    ]
    plain = [n for n, each in enumerate(found) if each.dtype == "bf16" and n not in compiled]
    assert compiled and max(plain) < min(compiled)


def test_the_floor_is_the_slower_of_arithmetic_and_traffic():
    each = next(
        each for each in check_ops.comparisons(quick=False)
        if (each.op, each.phase, each.dtype) == ("contrastive", "fwd+bwd", "bf16")
    )  # fmt: skip
    n, d = each.shape["n"], each.shape["d"]
    rates = {"copy_gb_s": 4000.0, "matmul_bf16_tflop_s": 800.0}
    floor = check_ops.floor_row(each, rates)
    assert floor["ms"] == pytest.approx(3 * 2 * n * n * d / 800e12 * 1e3)
    slow = check_ops.floor_row(each, rates | {"copy_gb_s": 1.0})
    assert slow["ms"] == pytest.approx(4 * n * d * 2 / 1e9 * 1e3) and "traffic" in slow["note"]


def test_the_reference_of_the_sigmoid_loss():
    inputs = draw(40, 16, "fp32", "cpu")
    wide = type(inputs)(*(t.double() for t in vars(inputs).values()))
    found, exact = float64_reference(True, inputs, rows=16), run(eager, True, wide)()
    near = run(eager, True, inputs)()
    for name, value in exact.items():
        assert_as_accurate(name, found[name], near[name].double(), value, 0.0)
    assert torch.equal(float64_reference(False, inputs, rows=16)["loss"], found["loss"])
