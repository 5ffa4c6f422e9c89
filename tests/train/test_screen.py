"""What a run prints: its beginning, its steps at 80 columns, its scores and its end."""

import contextlib
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from fastvlp_tests import photo_shards, tiny_run

from fastvlp import cli
from fastvlp.evaluate.features import Features
from fastvlp.models import base
from fastvlp.train import evaluation, screen
from fastvlp.train.evaluation import Best, Judged, judge
from fastvlp.train.logging import read_log
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks.clip import held_out_loss, plain_loss

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_runs):
    """A run on shards with evaluation data, and what it printed."""
    place = tmp_path_factory.mktemp("run")
    shards = photo_shards.write(place / "shards", 12)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main(
            ["train", "clip", "--data", shards, "--eval-data", shards, "--folder",
             str(place / "clip run"), "--steps", "4", "--batch-size", "4", "--log-every", "2",
             "--save-every", "6", "--device", "cpu", "--precision", "float32"]
        )  # fmt: skip
    return place / "clip run", out.getvalue()


def test_the_beginning_says_what_is_done_where(run):
    folder, shown = run
    model = base.load(folder / "model")
    parameters = screen.amount(sum(p.numel() for p in model.parameters()))
    lines = shown.splitlines()
    facts = {line[:10].strip(): line[10:] for line in lines if line[:1].isalpha()}
    assert facts["device"] == "CPU, 1 thread, float32"
    assert f"model     tiny: {parameters} parameters, images of 64 x 64 pixels" in lines
    assert any(line.startswith("data      12 pairs of") for line in lines)
    assert facts["held out"] == "12 in eval"
    assert facts["length"] == "4 steps of 4 pairs, 1.33 epochs"


def test_validation_loss_is_logged_and_the_best_model_kept(run, tmp_path):
    folder, shown = run
    losses = {row["step"]: row["eval/loss"] for row in read_log(folder) if "eval/loss" in row}
    assert list(losses) == list(range(1, 5))
    best = json.loads((folder / "best" / "best.json").read_text())
    step = min(losses, key=losses.get)
    assert (best["step"], best["value"]) == (step, losses[step])
    assert f"of step {step}: held-out loss {losses[step]:.4g}" in " ".join(shown.split())
    cli.main(["evaluate", "retrieval", str(folder / "best"), "--output", str(tmp_path / "x.json")])
    written = json.loads((tmp_path / "x.json").read_text())
    logged = next(row for row in read_log(folder) if row["step"] == step and "eval/loss" in row)
    assert written["text_to_image R@1"] == logged["eval/text_to_image/R@1"]


def test_the_end_has_the_time_a_table_and_the_next_commands(run):
    folder, shown = run
    lines = shown.splitlines()
    assert any(line.startswith("time      4 steps and evaluation in ") for line in lines)
    assert "scores                 R@1     R@5    R@10" in lines
    assert f"  fastvlp evaluate retrieval '{folder}'" in lines
    assert f"  fastvlp search '{folder}' \"a red bus\" --images FOLDER" in lines
    paths = [line for line in lines if str(folder.parent) not in line]
    assert max(map(len, paths)) <= 80 and "\x1b" not in shown


def test_a_run_that_begins_anew_forgets_the_best_of_before(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "best.json").write_text('{"step": 9, "by": "loss", "value": -1.0}')
    tiny_run.train(tmp_path, tiny_run.PlainTask, steps=4, evaluate_every=2, ema=None)
    best = json.loads((tmp_path / "best" / "best.json").read_text())
    assert best["step"] in (2, 4) and best["value"] > 0
    # A finished run that is called again keeps its best.
    tiny_run.train(tmp_path, tiny_run.PlainTask, steps=4, evaluate_every=2, ema=None)
    assert json.loads((tmp_path / "best" / "best.json").read_text()) == best


def test_losses_are_judged_before_recalls():
    assert judge(3, {"a/loss": 2.0, "b/loss": 4.0, "a/x/R@1": 1.0}).value == 3.0
    assert judge(3, {"a/x/R@1": 0.25, "a/y/R@1": 0.75, "a/x/R@5": 1.0}).value == 0.5
    assert judge(3, {"matching/accuracy": 1.0}) is None


def test_only_a_lower_number_is_better(tmp_path):
    saved = []
    best = Best(tmp_path, lambda folder: (folder.mkdir(exist_ok=True), saved.append(folder)),
                Ranks(0, 1, torch.device("cpu"), None), begun=False)  # fmt: skip
    offers = [None, Judged(1, "loss", float("nan")), Judged(2, "loss", 3.0)]
    offers += [Judged(3, "loss", 3.0), Judged(4, "loss", 2.5), Judged(5, "loss", float("nan"))]
    assert [best.offer(each) for each in offers] == [False, False, True, False, True, False]
    assert saved == [tmp_path / "best"] * 2 and best.found.step == 4


def test_the_first_rank_decides_for_all(tmp_path, monkeypatch):
    told = Judged(7, "loss", 1.0)
    monkeypatch.setattr(evaluation.parallel, "from_first", lambda function, ranks: told)
    saved = []
    best = Best(tmp_path, saved.append, Ranks(1, 2, torch.device("cpu"), None), begun=True)
    # This rank's own number is no better, by a bit.
    assert best.offer(Judged(7, "loss", 1.0 + 1e-7)) and saved == [tmp_path / "best"]


def test_the_held_out_loss_is_that_of_whole_batches():
    torch.manual_seed(0)
    images, texts = torch.nn.functional.normalize(torch.randn(2, 10, 8), dim=-1)
    found = Features(images, texts, torch.arange(10), torch.arange(10))
    scale = torch.tensor(7.0)
    wanted = [plain_loss(images[at : at + 4], texts[at : at + 4], scale).item() for at in (0, 4)]
    assert held_out_loss(found, 7.0, 4) == pytest.approx(sum(wanted) / 2, rel=1e-5)
    whole = plain_loss(images, texts, scale).item()
    assert held_out_loss(found, 7.0, 64) == pytest.approx(whole, rel=1e-5)


def test_a_line_of_a_step_shows_what_went_wrong_and_what_has_room():
    row = {"step": 7, "loss": 1.23456, "itc_loss": 2.0, "lr": 1e-4, "pairs_per_second": 12.345,
           "skipped": 2, **{f"metric_{i}": 1.0 for i in range(9)}}  # fmt: skip
    line = screen.step_line(row, 90)
    assert line.startswith("step 7/90  loss 1.235  lr 0.0001  12.3 pairs/s  skipped 2  itc_loss 2")
    assert len(line) <= 80 and "metric_8" not in line
    assert "skipped" not in screen.step_line(row | {"skipped": 0}, 90)
    assert screen.bar_text(row) == "loss 1.235  12.3 pairs/s  2 skipped"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.04, "0.0 s"), (59.97, "1 min 0 s"), (3599.6, "1 h 0 min")]
)
def test_durations(seconds, said):
    assert screen.duration(seconds) == said


def wandb(monkeypatch):
    """In place of the package: what it was told."""
    told = []
    run = SimpleNamespace(
        log=lambda row, step: told.append((step, row)), finish=lambda: told.append("finished")
    )

    def init(**options):
        told.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return told


def test_wandb_gets_the_numbers_of_the_log_under_one_id(tmp_path, monkeypatch):
    told = wandb(monkeypatch)
    tiny_run.train(tmp_path, tiny_run.PlainTask, steps=2, log="wandb")
    begun, *rows, end = told
    assert begun["config"]["steps"] == 2 and begun["resume"] == "allow" and end == "finished"
    assert begun["project"] == "fastvlp" and begun["name"] == tmp_path.name
    logged = [(row.pop("step"), row) for row in read_log(tmp_path)]
    assert rows == logged
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    told.clear()
    tiny_run.train(tmp_path, tiny_run.PlainTask, steps=2, log="wandb")
    assert told[0]["id"] == begun["id"] and "project" not in told[0]
    assert any((tmp_path / "tensorboard").iterdir())


def test_without_wandb_it_says_what_to_do_before_anything_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["train", "clip", "--log", "wandb", "--folder", str(tmp_path / "run")])
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
