"""What is left out of shards is said by training and by evaluation, and counted in the scores."""

import json

import pytest
import torch
from fastvlp_tests import photo_shards
from fastvlp_tests.tiny_vocabularies import bpe_file

from fastvlp import cli
from fastvlp.data.shards.index import Fault
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks import data, vocabularies
from fastvlp.train.tasks.data import about_left_out, left_out, lines_of_progress, shard_loader

pytestmark = pytest.mark.usefixtures("quick_runs")
ALONE = Ranks(0, 1, torch.device("cpu"), None)


def sample(number):
    """Of twelve, the fourth looks whole until it is decoded."""
    good = photo_shards.good(number)
    if number == 3:
        good.members["jpg"] = photo_shards.undecodable(number)
    return good


def test_training_and_evaluation_say_it_and_count_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path / "cache"))
    shards = photo_shards.write(tmp_path / "shards", 12, 6, sample)
    second = tmp_path / "shards" / "00001.tar"
    content = bytearray(second.read_bytes())
    content[:512] = b"x" * 512  # the header of the first image: only its caption is left
    second.write_bytes(content)
    cli.main([
        "train", "clip", "--folder", str(tmp_path / "run"), "--data", shards, "--eval-data", shards,
        "--tokenizer", str(bpe_file(tmp_path)), "--steps", "4", "--batch-size", "5",
        "--precision", "float32", "--device", "cpu", "--max-broken", "0.5",
    ])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    (begin, *more) = [line for line in lines if line.startswith("data: ")]
    assert begin.startswith("data: 2 left out (1 damaged shard, 1 missing part); the first: ")
    assert str(second) in begin and begin.count(";") == 2
    assert len(more) == 1 and "data: 3 left out" in more[0] and "1 image" in more[0]
    assert [line[:16] for line in lines if line.startswith("eval: ")] == [
        "eval: 2 left out", "eval: 3 left out",
    ]  # fmt: skip
    scores = tmp_path / "scores.json"
    # By the run's own --max-broken, without which this is too much.
    cli.main(["evaluate", "retrieval", str(tmp_path / "run"), "--output", str(scores)])
    assert "data: 3 left out (" in capsys.readouterr().out
    found = json.loads(scores.read_text())
    assert (found["pairs"], found["left_out"]) == (10, 3)


def test_data_without_faults_leave_nothing_out():
    assert left_out(object(), ALONE) == []


def test_a_line_names_the_first_three():
    faults = [Fault("image", "a.tar", f"{i}.jpg", "cut") for i in range(5)]
    said = about_left_out([*faults, Fault("refused shard", "b.tar", "", "compressed")], "data")
    assert said == (
        "data: 6 left out (5 image, 1 refused shard); the first: a.tar, '0.jpg': cut; "
        "a.tar, '1.jpg': cut; a.tar, '2.jpg': cut"
    )


def test_all_ranks_index_the_shards_that_a_vocabulary_is_learned_from(tmp_path, monkeypatch):
    from fastvlp.train.config import TrainClip

    monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path / "cache"))
    shards = photo_shards.write(tmp_path / "shards", 4, 2)
    made = []

    def loader(*arguments, plain=vocabularies.shard_loader, **options):
        made.append(plain(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(vocabularies, "shard_loader", loader)
    monkeypatch.setattr(vocabularies.parallel, "from_first", lambda *_, **__: None)
    second = Ranks(1, 2, torch.device("cpu"), None)
    config = TrainClip(folder=tmp_path, data=shards, device="cpu")
    vocabularies.learned(config, "clip_train", "tokenizer.json", list, second)
    assert [(each.rank, each.world_size, each.samples) for each in made] == [(1, 2, 4)]
    with pytest.raises(RuntimeError, match="shutdown"):  # closed
        next(iter(made[0]))


def test_lines_say_how_far_the_examination_of_shards_is(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: now[0])
    say = lines_of_progress("photos/*.tar")
    for seconds, done in ((1, 0.5), (6, 1.25), (2, 1.5), (4, 2), (30, 4)):
        now[0] += seconds
        say(done, 4)
    # Not before some seconds have passed, nor more often, nor of the end.
    assert capsys.readouterr().out.splitlines() == [
        "photos/*.tar: examined 1.2 of 4 shards",
        "photos/*.tar: examined 2.0 of 4 shards",
    ]


@pytest.mark.parametrize("progress", [True, False])
def test_a_run_says_how_far_the_examination_of_its_shards_is(
    tmp_path, monkeypatch, capsys, progress
):
    monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "_LINES", 0.0)
    shards = photo_shards.write(tmp_path, 6, 2)
    shard_loader(shards, "clip_eval", {}, 1, None, ALONE, progress=progress).close()
    said = [f"{shards}: examined {n}.0 of 3 shards" for n in (1, 2)]
    assert capsys.readouterr().out.splitlines() == (said if progress else [])
