"""Where the images of pairs are read from: one folder, not outside of it, or parquet files."""

import io
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fastvlp import cli
from fastvlp.data.shards import images as pair_images
from fastvlp.data.shards.write import read_shard


def image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def run(source, output, *options):
    cli.main(["shards", str(source), str(output), "--no-progress", *options])


def fails(capsys, *arguments) -> str:
    with pytest.raises(SystemExit, match="^2$"):
        run(*arguments)
    return capsys.readouterr().err


def samples(folder):
    return [sample for path in sorted(folder.glob("*.tar")) for sample in read_shard(path)]


@pytest.fixture
def photos(tmp_path):
    """Forty images in tmp_path/photos and their CSV beside that folder."""
    (tmp_path / "photos").mkdir()
    for i in range(40):
        (tmp_path / "photos" / f"{i}.png").write_bytes(image(i))
    rows = "".join(f"{i}.png,caption {i}\n" for i in range(40))
    (tmp_path / "pairs.csv").write_text(f"path,caption\n{rows}")
    return tmp_path


def test_a_wrong_folder_of_images_is_said_once_with_the_right_one(photos, capsys):
    error = fails(capsys, photos / "pairs.csv", photos / "out")
    assert f"none of 40 images that were looked for is there, the first {photos}/0.png" in error
    assert f"(--images), perhaps {photos / 'photos'}" in error and error.count("\n") == 1
    (photos / "elsewhere").mkdir()
    wrong = ("--images", str(photos / "elsewhere" / "none"))
    error = fails(capsys, photos / "pairs.csv", photos / "out", *wrong)
    assert "there is no folder" in error
    run(photos / "pairs.csv", photos / "out", "--images", str(photos / "photos"))
    assert len(samples(photos / "out")) == 40
    # Of finished shards no image is looked for.
    (photos / "photos").rename(photos / "moved")
    run(photos / "pairs.csv", photos / "out", "--images", str(photos / "photos"))


def test_one_image_of_many_is_enough_for_the_right_folder(photos, capsys):
    for i in range(1, 40):
        (photos / "photos" / f"{i}.png").unlink()
    rows = (photos / "pairs.csv").read_text().replace("path,caption\n", "")
    odd = f"{'long' * 100}.png,too long\nn\0ul.png,nul\n"
    (photos / "pairs.csv").write_text(f"path,caption\n{odd}{rows}")
    options = ("--images", str(photos / "photos"), "--max-broken", "1")
    run(photos / "pairs.csv", photos / "out", *options)
    assert len(samples(photos / "out")) == 1
    (photos / "photos" / "0.png").write_bytes(b"damaged")
    error = fails(capsys, photos / "pairs.csv", photos / "other", *options)
    assert "none of 42 rows is good. The first:" in error and "image cannot be read" in error


def test_images_outside_the_folder_are_named_and_not_read(photos, capsys):
    secret = photos / "secret.png"
    secret.write_bytes(image(99))
    inside = photos / "photos"
    os.symlink(photos, inside / "link")
    paths = [str(secret), "../secret.png", "sub/../../secret.png", "link/../secret.png"]
    good = ["0.png", "sub/../1.png", str(inside / "2.png"), "link/secret.png"]
    rows = "".join(f"{path},caption {n}\n" for n, path in enumerate([*paths, *good]))
    (photos / "p.csv").write_text(f"path,caption\n{rows}")
    options = ("--images", str(inside), "--max-broken", "0.5")
    run(photos / "p.csv", photos / "out", *options)
    captions = sorted(sample.members["txt"].decode() for sample in samples(photos / "out"))
    assert captions == [f"caption {n}" for n in range(4, 8)]
    broken = (photos / "out" / "broken.tsv").read_text()
    assert broken.count("image outside the folder") == 3 and "--allow-outside" in broken
    # ".." is resolved in the path as it is written: past a link it does not lead out.
    assert "line 5\timage cannot be read\tlink/../secret.png" in broken
    assert "made from other images" in fails(
        capsys, photos / "p.csv", photos / "out", *options, "--allow-outside"
    )
    run(photos / "p.csv", photos / "all", *options, "--allow-outside")
    assert len(samples(photos / "all")) == 7
    (photos / "q.csv").write_text(f"path,caption\n{secret},a\n../secret.png,b\n")
    error = fails(capsys, photos / "q.csv", photos / "q", "--images", str(inside))
    assert "All 2 that were looked for lead out" in error and "--allow-outside" in error


def test_images_out_of_parquet_files(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_images, "_ROWS", 2)
    (tmp_path / "4.png").write_bytes(image(4))
    rows = [{"bytes": image(i), "path": "same.png"} for i in range(4)]
    rows += [{"bytes": None, "path": "4.png"}, rows[1], {"bytes": None, "path": None}]
    captions = [[f"first {i}", f"second {i}"] for i in range(7)]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(rows, kind), "caption": captions})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=3)
    run(tmp_path / "t.parquet", tmp_path / "out", "--per-shard", "5", "--max-broken", "0.2")
    found = samples(tmp_path / "out")
    assert len(found) == 12
    ids = {}
    for sample in found:
        which = int(sample.members["txt"].decode()[-1])
        assert sample.members["png"] == image({5: 1}.get(which, which))
        ids.setdefault(sample.members["id"], set()).add(which)
    assert sorted(map(sorted, ids.values())) == [[0], [1, 5], [2], [3], [4]]
    assert "t.parquet, row 7: No such file" in (tmp_path / "out" / "broken.tsv").read_text()
    assert not list((tmp_path / "out").glob(".*.partial"))
    whole = [path.read_bytes() for path in sorted((tmp_path / "out").glob("*.tar"))]
    (tmp_path / "out" / "shard-000001.tar").unlink()
    run(tmp_path / "t.parquet", tmp_path / "out", "--per-shard", "5", "--max-broken", "0.2")
    assert [path.read_bytes() for path in sorted((tmp_path / "out").glob("*.tar"))] == whole


def test_an_output_that_is_a_file_is_refused(photos, capsys):
    (photos / "file").write_text("")
    for output in (photos / "file", photos / "file" / "out"):
        error = fails(capsys, photos / "pairs.csv", output, "--images", str(photos / "photos"))
        assert "folder: expected a folder for the shards" in error and "is a file" in error


def test_a_source_without_a_pair_gives_its_first_reasons(tmp_path, capsys):
    (tmp_path / "p.csv").write_text("path,caption\na.jpg,\nb.jpg\n")
    error = fails(capsys, tmp_path / "p.csv", tmp_path / "out", "--max-broken", "1")
    assert "the source has none. The first:" in error and "line 2: empty caption" in error
