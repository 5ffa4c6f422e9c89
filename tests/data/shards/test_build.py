"""The command that makes shards: what is in them, broken images, interruption at any point."""

import io
import json
import random
import signal
import subprocess
import sys
from collections import Counter

import filelock
import numpy as np
import pytest
from PIL import Image

from fastvlp import cli
from fastvlp.commands import progress
from fastvlp.data.shards import build as module
from fastvlp.data.shards.write import read_shard

FORMATS = ["JPEG", "PNG", "WEBP", "BMP"]
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}


def image(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A CSV of 23 images, three of them with a second caption."""
    folder = tmp_path_factory.mktemp("good")
    rows = ["path,caption,image_id"]
    for i in range(23):
        kind = FORMATS[i % 4]
        # The extension lies now and then, as it does in the world.
        (folder / f"{i}.jpg").write_bytes(image(i, kind))
        rows += [f"{i}.jpg,caption {i} é,id-{i}"]
        rows += [f"{i}.jpg,another {i},id-{i}"] if i < 3 else []
    (folder / "pairs.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


def run(source, output, *options):
    cli.main(["shards", str(source), str(output), "--per-shard", "4", "--no-progress", *options])


def contents(folder):
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return {path.name: path.read_bytes() for path in files}


def samples(folder):
    return [sample for path in sorted(folder.glob("*.tar")) for sample in read_shard(path)]


def test_every_pair_is_there_once_and_images_are_copied(good, tmp_path, capsys):
    run(good / "pairs.csv", tmp_path)
    found = samples(tmp_path)
    assert len({sample.key for sample in found}) == len(found) == 26
    for sample in found:
        number = int(sample.members["id"].decode().removeprefix("id-"))
        content = (good / f"{number}.jpg").read_bytes()
        assert set(sample.members) == {EXTENSIONS[FORMATS[number % 4]], "txt", "id"}
        assert content in sample.members.values()
    wanted = [f"caption {i} é" for i in range(23)] + [f"another {i}" for i in range(3)]
    captions = [sample.members["txt"].decode() for sample in found]
    assert Counter(captions) == Counter(wanted)
    assert captions != [c for c in wanted if c in captions]
    output = capsys.readouterr().out
    assert "26 samples in 7 shards" in output and "shard-{000000..000006}.tar" in output
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["samples"] == 26 and [s["count"] for s in manifest["shards"]] == [4] * 6 + [2]
    assert (tmp_path / "broken.tsv").read_text() == "place\tfault\tdetail\n"


def test_the_seed_gives_the_order_and_nothing_else_does(good, tmp_path):
    for name, options in {
        "a": ["--seed", "1"],
        "b": ["--seed", "1", "--workers", "1", "--no-check"],
        "c": ["--seed", "2"],
    }.items():
        run(good / "pairs.csv", tmp_path / name, *options)
    first, again, other = (samples(tmp_path / name) for name in "abc")
    assert first == again != other
    by_content = [sorted(repr(s.members) for s in found) for found in (first, other)]
    assert by_content[0] == by_content[1]


def test_other_kinds_of_source_give_the_same_samples(good, tmp_path):
    source = tmp_path / "tree"
    (source / "images").mkdir(parents=True)
    token, coco = [], {"images": [], "annotations": []}
    for i in range(6):
        (source / "images" / f"{i}.png").write_bytes(image(i, "PNG"))
        (source / "images" / f"{i}.txt").write_text(f"first {i}\nsecond {i}\n")
        coco["images"].append({"id": i, "file_name": f"{i}.png"})
        for number, word in enumerate(("first", "second")):
            token.append(f"{i}.png#{number}\t{word} {i}\n")
            coco["annotations"].append({"image_id": i, "caption": f"{word} {i}"})
    (source / "results.token").write_text("".join(token))
    (source / "captions.json").write_text(json.dumps(coco))
    images = ["--images", str(source / "images")]
    run(source / "images", tmp_path / "folder")
    run(source / "results.token", tmp_path / "flickr", *images)
    run(source / "captions.json", tmp_path / "coco", *images)
    flickr, coco, folder = (samples(tmp_path / n) for n in ("flickr", "coco", "folder"))
    assert flickr == coco
    assert [s.members["png"] for s in folder] == [s.members["png"] for s in flickr]
    assert [s.members["txt"] for s in folder] == [s.members["txt"] for s in flickr]
    assert Counter(s.members["id"] for s in folder) == {f"{i}.png".encode(): 2 for i in range(6)}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Thirty images, of which six are broken, each in a way of its own."""
    folder = tmp_path_factory.mktemp("damaged")
    rows = ["path\tcaption"] + [f"{i}.jpg\tcaption {i}" for i in range(30)]
    for i in range(30):
        (folder / f"{i}.jpg").write_bytes(image(i))
    (folder / "3.jpg").unlink()
    (folder / "7.jpg").write_bytes(b"")
    (folder / "11.jpg").write_bytes(b"not an image at all")
    (folder / "15.jpg").write_bytes(image(15, "PNG")[:-40])
    (folder / "19.jpg").write_bytes(image(19, "PCX"))
    rows[24] = "23.jpg"
    (folder / "pairs.tsv").write_text("\n".join(rows))
    return folder


BROKEN = {3, 7, 11, 15, 19, 23}


def test_broken_rows_are_counted_and_named_and_cost_only_themselves(damaged, tmp_path, capsys):
    run(damaged / "pairs.tsv", tmp_path, "--max-broken", "0.2")
    captions = {sample.members["txt"].decode() for sample in samples(tmp_path)}
    assert captions == {f"caption {i}" for i in range(30) if i not in BROKEN}
    lines = (tmp_path / "broken.tsv").read_text().splitlines()[1:]
    places = {line.split("\t")[0]: line.split("\t")[1:] for line in lines}
    assert set(places) == {f"pairs.tsv, line {i + 2}" for i in BROKEN}
    assert places["pairs.tsv, line 5"][0] == "image cannot be read"
    assert "3.jpg: No such file" in places["pairs.tsv, line 5"][1]
    assert places["pairs.tsv, line 13"] == ["image cannot be decoded", "11.jpg: not an image"]
    assert places["pairs.tsv, line 21"] == [
        "image format",
        "19.jpg: PCX; convert it to JPEG or PNG",
    ]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["samples"] == 24
    assert manifest["broken"] == {
        "image cannot be decoded": 3,
        "malformed row": 1,
        "image cannot be read": 1,
        "image format": 1,
    }
    assert "6 broken rows (3 image cannot be decoded" in capsys.readouterr().out


def test_without_the_check_a_truncated_image_passes(damaged, tmp_path):
    run(damaged / "pairs.tsv", tmp_path, "--max-broken", "0.2", "--no-check")
    assert len(samples(tmp_path)) == 25


def test_too_many_broken_rows_stop_it_and_mended_ones_are_taken_in(damaged, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(damaged / "pairs.tsv", tmp_path / "out", "--max-broken", "0.1")
    error = capsys.readouterr().err
    assert "expected at most 3 broken rows; got 6 so far" in error and "pairs.tsv, line" in error
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(SystemExit, match="2"):
        run(damaged / "pairs.tsv", tmp_path / "less", "--max-broken", "0.09")  # 2.7 rows
    assert "expected at most 2 broken rows" in capsys.readouterr().err
    healed = tmp_path / "healed"
    healed.mkdir()
    for i in range(30):
        (healed / f"{i}.jpg").write_bytes(image(i))
    (healed / "pairs.tsv").write_bytes((damaged / "pairs.tsv").read_bytes())
    # Rows that were broken where the images were not must not be kept.
    with pytest.raises(SystemExit, match="2"):
        run(healed / "pairs.tsv", tmp_path / "out")
    assert "made from other images" in capsys.readouterr().err
    (healed / "3.jpg").rename(healed / "away")
    run(healed / "pairs.tsv", tmp_path / "mended")
    (healed / "away").rename(healed / "3.jpg")
    run(healed / "pairs.tsv", tmp_path / "mended")
    assert len(samples(tmp_path / "mended")) == 28
    run(healed / "pairs.tsv", tmp_path / "mended", "--retry-broken")
    run(healed / "pairs.tsv", tmp_path / "fresh")
    assert contents(tmp_path / "mended") == contents(tmp_path / "fresh")
    assert len(samples(tmp_path / "mended")) == 29


KILLED = """
import os, signal, sys
from fastvlp import cli
from fastvlp.commands import progress
from fastvlp.commands import shards as command
from fastvlp.data.shards import build as module
where, at, *arguments = sys.argv[1:]
calls = 0
def killing(function):
    def wrapped(*arguments):
        global calls
        calls += 1
        if calls == int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return wrapped
target, name = {"image": (module, "Sample"), "journal": (module._Journal, "add")}[where]
setattr(target, name, killing(getattr(target, name)))
cli.main(arguments)
"""


@pytest.mark.parametrize(
    ("where", "at", "finished"), [("image", 9, 2), ("journal", 3, 2)], ids=["in a shard", "between"]
)
def test_a_killed_run_goes_on_where_it_stopped(good, tmp_path, where, at, finished, monkeypatch):
    options = [str(good / "pairs.csv"), str(tmp_path / "a"), "--per-shard", "4", "--no-progress"]
    command = [sys.executable, "-c", KILLED, where, str(at), "shards", *options]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "a").glob("*.tar"))}
    kept = dict(list(kept.items())[:finished])
    assert len(kept) == finished and not (tmp_path / "a" / "manifest.json").exists()
    written = []
    write = module.write_shard
    monkeypatch.setattr(module, "write_shard", lambda p, s: written.append(p.name) or write(p, s))
    run(good / "pairs.csv", tmp_path / "a")
    assert written == [f"shard-{i:06d}.tar" for i in range(finished, 7)]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    run(good / "pairs.csv", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not list((tmp_path / "a").glob("*.partial"))


def test_any_damage_after_the_end_is_repaired(good, tmp_path):
    run(good / "pairs.csv", tmp_path)
    whole = contents(tmp_path)
    rng = random.Random(0)
    journal = tmp_path / ".journal.jsonl"
    for _ in range(6):
        victims = rng.sample(sorted(whole), 3)
        (tmp_path / victims[0]).unlink()
        (tmp_path / victims[1]).write_bytes(whole[victims[1]][:-1])
        (tmp_path / victims[2]).write_bytes(b"\0" + whole[victims[2]][1:])
        recipe = journal.read_bytes().index(b"\n") + 1
        journal.write_bytes(journal.read_bytes()[: rng.randrange(recipe, journal.stat().st_size)])
        run(good / "pairs.csv", tmp_path)
        assert contents(tmp_path) == whole


def test_a_finished_run_is_not_done_again(good, tmp_path, monkeypatch, capsys):
    run(good / "pairs.csv", tmp_path)
    whole = contents(tmp_path)
    monkeypatch.setattr(module, "_load", lambda *_: pytest.fail("an image was read"))
    run(good / "pairs.csv", tmp_path)
    assert contents(tmp_path) == whole and "26 samples" in capsys.readouterr().out


def test_other_options_or_a_second_process_are_refused(good, tmp_path, capsys):
    run(good / "pairs.csv", tmp_path / "a")
    whole = contents(tmp_path / "a")
    with pytest.raises(SystemExit, match="2"):
        run(good / "pairs.csv", tmp_path / "a", "--seed", "5")
    assert "holds shards made from other seed" in capsys.readouterr().err
    with filelock.FileLock(tmp_path / "a" / ".lock"), pytest.raises(SystemExit, match="1"):
        run(good / "pairs.csv", tmp_path / "a")
    assert "another process is making shards" in capsys.readouterr().err
    assert contents(tmp_path / "a") == whole
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.tar").write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        run(good / "pairs.csv", tmp_path / "b")
    assert "tar files of another origin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--per-shard", "0"], "per_shard: expected a positive number"),
        (["--max-broken", "2"], "max_broken: expected 0 to 1"),
        (["--max-broken", "nan"], "max_broken: expected 0 to 1"),
        (["--workers", "-1"], "workers: expected 0 or more"),
    ],
)
def test_options_out_of_range(good, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(good / "pairs.csv", tmp_path / "out", *options)
    assert message in capsys.readouterr().err


def test_an_empty_source_is_an_error(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "in", tmp_path / "out")
    assert "the source has none" in capsys.readouterr().err


def test_without_a_terminal_lines_tell_the_progress(good, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    cli.main(["shards", str(good / "pairs.csv"), str(tmp_path / "out")])
    assert "1 of 26 rows, 0 broken\n" in capsys.readouterr().out
    run(good / "pairs.csv", tmp_path / "again")
    assert "of 26 rows" not in capsys.readouterr().out


def test_the_progress_bar_counts_rows_and_broken_ones(damaged, tmp_path, capsys):
    options = [str(damaged / "pairs.tsv"), str(tmp_path), "--max-broken", "0.2"]
    cli.main(["shards", *options])
    output = capsys.readouterr().out
    assert f"{tmp_path.name}: 29 of 29 rows, 6 broken\n" in output


def test_a_resumed_run_whose_images_left_are_missing_does_what_the_whole_one_does(tmp_path):
    rows = ["path,caption"] + [f"{i}.png,caption {i}" for i in range(8)]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(image(i, "PNG"))
    run(tmp_path / "pairs.csv", tmp_path / "out")
    second = tmp_path / "out" / "shard-000001.tar"
    for sample in read_shard(second):
        (tmp_path / f"{sample.members['txt'].decode()[-1]}.png").unlink()
    second.unlink()
    for name in ("out", "whole"):
        run(tmp_path / "pairs.csv", tmp_path / name, "--max-broken", "0.5")
    assert len(samples(tmp_path / "out")) == 4
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
