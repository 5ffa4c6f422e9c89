"""Runs in one process: what they leave, how they resume, and what they refuse."""

import json

import pytest
import torch
from fastvlp_tests.tiny_run import PlainTask, build, settings, train, weights

from fastvlp.train import logging, parallel
from fastvlp.train.logging import read_log

pytestmark = pytest.mark.usefixtures("quick_runs")


def test_a_run_leaves_its_settings_logs_curve_and_model(tmp_path, capsys, monkeypatch, quick_runs):
    monkeypatch.setattr(logging, "draw_curve", quick_runs)
    scores, _ = train(tmp_path, evaluate_every=4)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        ".lock", "best", "checkpoints", "config.yaml", "curve.png", "log.jsonl", "model.json",
        "model.safetensors", "run.json", "tensorboard", "tokenizer.json",
    }  # fmt: skip
    rows = read_log(tmp_path)
    assert rows[0].keys() == {
        "step", "loss", "logit_scale", "lr", "gradient_norm", "skipped", "pairs_per_second",
    }  # fmt: skip
    evaluated = {row["step"] for row in rows if any(k.startswith("eval/") for k in row)}
    assert evaluated == {4, 8}
    last = {k.removeprefix("eval/"): v for k, v in rows[-1].items() if k != "step"}
    assert last == scores
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "logit_scale" in capsys.readouterr().out


def test_tensorboard_has_the_numbers_of_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    wanted = [row["loss"] for row in read_log(tmp_path) if "loss" in row]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(wanted)


def test_the_average_is_what_is_saved(tmp_path):
    _, task = train(tmp_path, PlainTask)
    saved = weights(tmp_path)
    assert not torch.equal(saved["text_projection"], task.model.text_projection)
    train(tmp_path / "plain", PlainTask, ema=None)
    assert not torch.equal(weights(tmp_path / "plain")["text_projection"], saved["text_projection"])


def test_a_run_that_has_ended_does_nothing_more(tmp_path):
    first, _ = train(tmp_path)
    before = weights(tmp_path)
    again, _ = train(tmp_path)
    assert again == first
    assert all(torch.equal(before[k], v) for k, v in weights(tmp_path).items())


def test_resume_never_refuses_a_folder_with_a_checkpoint(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match="holds the checkpoint step-00000008"):
        train(tmp_path, resume="never")


def test_resume_never_leaves_damaged_checkpoints_as_they_are(tmp_path):
    train(tmp_path, steps=2, save_every=1)
    last = tmp_path / "checkpoints" / "step-00000002"
    for file in last.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="holds the checkpoint step-00000002"):
        train(tmp_path, steps=2, save_every=1, resume="never")
    assert last.is_dir() and len(list(last.parent.iterdir())) == 2


def test_recomputing_changes_nothing_and_compiling_little(tmp_path):
    for name, changes in {
        "plain": {}, "recomputed": {"recompute": True}, "compiled": {"compile": "aot_eager"},
    }.items():  # fmt: skip
        train(tmp_path / name, PlainTask, steps=2, **changes)
    plain = weights(tmp_path / "plain")
    for name in ("recomputed", "compiled"):
        for key, value in weights(tmp_path / name).items():
            torch.testing.assert_close(value, plain[key], msg=f"{name} {key}")


def test_kernels_and_plain_pytorch_have_one_curve(tmp_path):
    for name, plain in (("kernels", False), ("plain", True)):
        config = settings(tmp_path / name)
        with parallel.ranks("cpu") as ranks:
            from fastvlp.train import run
            from fastvlp.train.tasks.clip import plain_loss

            task, loader = build(config, ranks, PlainTask)
            if plain:
                task.model.use_reference()
                task.loss = plain_loss
            run.fit(config, task, loader, ranks)
    curves = [
        [row["loss"] for row in read_log(tmp_path / name) if "loss" in row]
        for name in ("kernels", "plain")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_a_batch_that_ranks_cannot_share_is_refused():
    from fastvlp.train.parallel import Ranks
    from fastvlp.train.tasks.clip_setup import build

    three = Ranks(0, 3, torch.device("cpu"), None)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 3 ranks"):
        build(settings(None), three)


def test_commands_train_and_evaluate_on_openmoji(tmp_path, monkeypatch, capsys):
    from functools import partial

    from fastvlp.commands import evaluate
    from fastvlp.commands import train as command
    from fastvlp.data import openmoji

    monkeypatch.setattr(openmoji, "build", partial(openmoji.build, limit=24))
    options = ["--steps", "2", "--batch-size", "8", "--precision", "float32", "--no-progress"]
    scores = command.parse(["clip", "--folder", str(tmp_path), *options]).run()
    assert "concept/text_to_image/R@10" in scores
    written = tmp_path / "scores.json"
    found = evaluate.parse(["retrieval", str(tmp_path), "--output", str(written)]).run()
    about = {"data": "openmoji", "split": "composition", "pairs": 24}
    assert json.loads(written.read_text()) == about | found
    for way in ("text_to_image", "image_to_text"):
        for k in (1, 5, 10):
            assert found[f"{way} R@{k}"] == pytest.approx(scores[f"composition/{way}/R@{k}"])
    assert "median_rank" in capsys.readouterr().out
    folders = tmp_path / "images"
    _folders(folders, openmoji.build(size=64))
    (tmp_path / "prompts.txt").write_text("{}\na {}\n")
    found = evaluate.parse(
        ["zero-shot", str(tmp_path), "--images", str(folders),
         "--templates", str(tmp_path / "prompts.txt")]
    ).run()  # fmt: skip
    assert found["chance top-1"] == 0.5 and 0 <= found["top-1"] <= 1 == found["top-5"]


def _folders(folder, data):
    for i, sample in zip(range(6), data.samples("train"), strict=False):
        place = folder / ("face" if i % 2 else "flag")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(sample.members["png"])


def test_zero_shot_accuracy_is_of_the_pairs_that_were_encoded():
    from torch.nn.functional import normalize

    from fastvlp.evaluate.features import Features
    from fastvlp.train.tasks.clip import features, zero_shot_over_groups

    with parallel.ranks("cpu") as ranks:
        task, _ = build(settings(None), ranks)
    loader, model = task.held_out["held_out"], task.model.eval()
    whole = features(model, loader, ranks)
    kept = torch.tensor([0, 3, 4, 9, 17, 30])
    found = Features(whole.images[kept], whole.texts[kept], whole.ids[kept], whole.index[kept])
    scores = zero_shot_over_groups(model, task.tokenizer, task.groups, loader.bases, found)
    right = []
    with torch.no_grad():
        prompts = [model.encode_text(task.tokenizer(group)) for group in task.groups.values()]
        classes = torch.stack([normalize(normalize(p, dim=1).mean(0), dim=0) for p in prompts])
    for pair in kept.tolist():
        names = list(task.groups)
        right.append(names[int((classes @ whole.images[pair]).argmax())] == loader.bases[pair])
    assert scores["top-1"] == pytest.approx(sum(right) / len(right))
