import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import itc_throughput
import pytest
import torch
from _harness import measure
from baselines.contrastive import features, softmax
from fastvlp_tests.bench_runs import BRIEF
from torch.utils.flop_counter import FlopCounterMode

BENCH = Path(__file__).parents[2] / "bench"


def double_inputs(n=40, d=24, scale=30.0):
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, n, d, dtype=torch.float64, generator=generator) / d**0.5
    return softmax.Inputs(image, text, torch.tensor(scale, dtype=torch.float64))


@pytest.mark.parametrize("rows", [1, 7, 40, 64])
def test_the_blocked_reference_is_autograd_of_the_formula(rows):
    inputs = double_inputs()
    expected = softmax.forward_backward(lambda: softmax.plain, inputs)()
    found = softmax.float64_reference(inputs, rows=rows)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize(
    "make_loss",
    [
        pytest.param(softmax.eager, id="eager"),
        pytest.param(
            functools.partial(softmax.chunked, None),
            id="linear_cross_entropy",
            marks=[
                pytest.mark.skipif(
                    not hasattr(torch.nn, "LinearCrossEntropyOptions"),
                    reason="needs a torch with torch.nn.LinearCrossEntropyOptions",
                ),
            ],
        ),
    ],
)
def test_a_peer_computes_the_same_loss(make_loss):
    inputs = double_inputs(n=700)
    found = softmax.forward_backward(make_loss, inputs)()
    for name, value in softmax.float64_reference(inputs).items():
        torch.testing.assert_close(found[name], value)


def test_a_loss_with_a_fixed_scale_gets_its_gradient_to_the_scale():
    inputs = double_inputs()

    def make_loss(scale):
        return lambda image, text, _: softmax.plain(image, text, scale)

    found = softmax.fixed_scale(make_loss, inputs)()
    reference = softmax.float64_reference(inputs)
    assert found["d_scale"].item() == pytest.approx(reference["d_scale"].item(), rel=1e-5)
    torch.testing.assert_close(found["d_image"], reference["d_image"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_implementations_say_how_they_round(dtype):
    implementations, missing = softmax.implementations(dtype, "cpu")
    names = [each.name for each in implementations]
    assert names[:3] == ["fastvlp", "floor", "floor3"] and len(set(names)) == len(names)
    peers = [each for each in implementations if not each.bound]
    assert all({"logits", "softmax"} <= set(each.extra) for each in peers)
    assert any(each.compiled for each in peers)
    assert {"inf-cl", "memeff"} <= {each.name for each in missing}


@pytest.mark.parametrize("logit_matmuls", [1, 2])
def test_the_floor_does_exactly_the_matmuls_it_names(logit_matmuls):
    n, d = 300, 16
    inputs = softmax.Inputs(*torch.randn(2, n, d), torch.ones(()))
    call = softmax.matmuls(logit_matmuls, inputs)
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == (logit_matmuls + 2) * 2 * n * n * d


def stored(tmp_path, count=50, width=16):
    from safetensors.torch import save_file

    image, text = torch.nn.functional.normalize(torch.randn(2, count, width), dim=2)
    path = tmp_path / "features.safetensors"
    save_file({"image": image.contiguous(), "text": text.contiguous()}, path)
    return features.Source(path, "pairs"), image, text


@pytest.mark.parametrize("n, dim", [(20, 16), (130, 16), (50, 8), (50, 40)])
def test_features_are_unit_rows_in_pairs_and_all_different(tmp_path, n, dim):
    source, image, text = stored(tmp_path)
    found = features.pairs(source, n, dim)
    again = features.pairs(source, n, dim)
    for side, repeat in zip(found, again, strict=True):
        assert side.shape == (n, dim) and torch.equal(side, repeat)
        torch.testing.assert_close(side.norm(dim=1), torch.ones(n))
        assert len(side.unique(dim=0)) == n
    if dim >= 16:
        # A rotation keeps every product, so each image still meets its own caption; a copy's
        # noise of norm 0.1 on both sides moves a product by less than 0.5.
        products = (found[0] * found[1]).sum(1).sort().values[: min(n, 50)]
        if n <= 50:
            own = (image * text).sum(1)
            assert (products[:, None] - own).abs().amin(1).max() < 1e-5


def test_a_description_says_what_was_done(tmp_path):
    source, _, _ = stored(tmp_path)
    assert features.describe(source, 40, 16) == "50 pairs"
    assert "tiled to 130" in features.describe(source, 130, 16)
    assert "from width 16 to 8" in features.describe(source, 40, 8)
    assert "random" in features.describe(features.RANDOM, 40, 8)


def test_quick_draws_where_nothing_is_cached_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path))
    source, missing = features.prepare("cached")
    assert source == features.RANDOM
    assert [each.name for each in missing] == ["features of real pairs"]
    assert not list(tmp_path.iterdir())


def test_real_pairs_are_encoded_once_per_model(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from fastvlp.data import openmoji, text
    from fastvlp.models import clip

    monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path))
    whole = openmoji.build

    def build(size, limit=None, **options):
        return whole(size, limit=min(limit or 6, 6), **options)

    monkeypatch.setattr(openmoji, "build", build)
    untrained, missing = features.prepare("all")
    assert not missing and "untrained" in untrained.about
    assert features.count(untrained) == 18
    written = untrained.path.stat().st_mtime_ns
    for pairs in ("all", "some", "cached"):
        assert features.prepare(pairs) == (untrained, [])
    assert untrained.path.stat().st_mtime_ns == written

    data = openmoji.build(size=64)
    splits = [data.load(split) for split in openmoji.SPLITS]
    captions = [caption for _, captions in splits for caption in captions]
    tokenizer = text.train_tokenizer(captions)
    model = clip.create(
        "tiny", vocab_size=tokenizer.vocab_size, context_length=tokenizer.context_length
    ).eval()
    clip.save(model, tmp_path / "openmoji_clip" / "tiny_clip")
    tokenizer.save(tmp_path / "openmoji_clip" / "tiny_clip_tokenizer.json")
    trained, missing = features.prepare("all")
    assert not missing and "the trained tiny" in trained.about and trained.path != untrained.path
    pixels = torch.cat([images for images, _ in splits]) / 127.5 - 1
    with torch.inference_mode():
        image, words, _ = model(pixels, tokenizer(captions))
    stored_features = load_file(trained.path)
    torch.testing.assert_close(stored_features["image"], image)
    torch.testing.assert_close(stored_features["text"], words)


def test_the_summary_names_the_best_of_each_kind():
    def row(impl, ms, **extra):
        return {
            "op": "contrastive",
            "impl": impl,
            "dtype": "bf16",
            "shape": {"n": 1000},
            "ms": ms,
            "peak_mb": 5.0,
            **extra,
        }

    text = itc_throughput.summary(
        [
            row("fastvlp", 100.0, logits="fp32", softmax="fp32"),
            row("floor", 80.0, matmuls=4),
            row("open_clip autocast", 300.0, logits="bf16", softmax="fp32"),
            row("open_clip autocast compiled", 250.0, logits="bf16", softmax="fp32"),
            row("linear_cross_entropy", 500.0, logits="fp32", softmax="fp32"),
            row("open_clip bf16", 150.0, logits="bf16", softmax="bf16"),
        ],
        ["bf16"],
        1000,
    )
    for part in (
        "10,000 pairs/s",
        "2.50x as fast as open_clip autocast compiled",
        "3.00x as fast as open_clip autocast (",
        "5.00x as fast as linear_cross_entropy",
        "1.50x as fast as open_clip bf16",
        "80% of the torch.mm floor of 4 matmuls",
    ):
        assert part in text


def test_some_pairs_are_encoded_where_the_first_table_is_to_come_soon(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path))
    monkeypatch.setattr(features, "LIMIT", 2)
    some, missing = features.prepare("some")
    assert not missing and features.describe(some, 6, 64).startswith("6 OpenMoji pairs")
    assert features.prepare("cached") == (some, [])
    every, _ = features._cache_file()
    every.write_bytes(some.path.read_bytes())
    assert features.prepare("some")[0].path == every != some.path


def test_sizes_of_a_run():
    for flags, n, alone, compiles in (
        ([], [1024, 4096], [16384], False),
        (["--full"], [1024, 2048, 4096, 8192], [32768], True),
        (["--quick"], [1024], [], False),
        (["--full", "--no-compile", "--n", "512", "--memory-n", ""], [512], [], False),
        (["--compile", "--n", "16384"], [16384], [], True),
    ):
        args = itc_throughput.parse(flags)
        assert (args.n, args.memory_n, args.compile) == (n, alone, compiles)


@pytest.mark.parametrize(
    "flags", [["--n", "1"], ["--dtype", "int8"], ["--scale", "-1"], ["--full", "--quick"]]
)
def test_wrong_flags_end_with_a_message(flags, capsys):
    with pytest.raises(SystemExit):
        itc_throughput.parse(flags)
    assert flags[0] in capsys.readouterr().err


def test_a_quick_run_writes_every_row(tmp_path):
    target = tmp_path / "itc.json"
    command = [
        sys.executable,
        str(BENCH / "itc_throughput.py"),
        *BRIEF,
        "--no-compile",
        "--n",
        "256",
        "--memory-n",
        "300",
        "--json",
        str(target),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "FASTVLP_CACHE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    assert found["meta"]["threads"] == 1 and found["meta"]["features"]
    fields = {"op", "impl", "dtype", "shape", "phase", "ms", "peak_mb", "error"}
    assert all(fields <= set(row) for row in found["rows"])
    for dtype in ("fp32", "bf16"):
        rows = {
            row["impl"]: row
            for row in found["rows"]
            if row["dtype"] == dtype and row["shape"] == {"n": 256, "d": 512}
        }
        expected, _ = softmax.implementations(dtype, "cpu")
        assert set(rows) == {each.name for each in expected if not each.compiled}
        assert all(row["ms"] > 0 and row["phase"] == "fwd+bwd" for row in rows.values())
        for name, row in rows.items():
            bound = name.startswith(measure.BOUND)
            assert (row["error"] is None) == bound and (row["peak_mb"] is None) == bound
    large = [row for row in found["rows"] if row["shape"]["n"] == 300]
    assert [row["impl"] for row in large] == ["fastvlp"] * 2
    assert "pairs/s" in done.stdout and "floor of 4 matmuls" in done.stdout
