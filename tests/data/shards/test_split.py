"""Training and validation divided by image: none in both, the same for other names and orders."""

import csv
import random

import pytest
from fastvlp_tests import photo_shards

from fastvlp import cli
from fastvlp.commands.shards import parse
from fastvlp.data.shards.dataset import expand
from fastvlp.data.shards.pairs import Pair
from fastvlp.data.shards.split import split_by_image
from fastvlp.data.shards.write import read_shard


def write_photos(folder, numbers, name="{}.jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / name.format(number)).write_bytes(photo_shards.jpeg(number))


def write_captions(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("path", "caption"), *rows])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """20 photographs, every fourth with two captions."""
    folder = tmp_path_factory.mktemp("mine")
    write_photos(folder / "photos", range(20))
    rows = [(f"{i}.jpg", f"photo {i}") for i in range(20)]
    write_captions(folder / "captions.csv", rows + [(f"{i}.jpg", f"same {i}") for i in (0, 4, 8)])
    return folder


def run(folder, output, *options):
    return parse(
        [str(folder / "captions.csv"), str(output), "--images", str(folder / "photos"),
         "--no-progress", *options]
    ).run()  # fmt: skip


def images_of(folder):
    """The content and the captions of the images in a folder of shards."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        for sample in read_shard(path):
            found.setdefault(sample.members["jpg"], set()).add(sample.members["txt"].decode())
    return found


def test_nine_of_ten_images_are_for_training_and_none_is_on_both_sides(photos, tmp_path, capsys):
    run(photos, tmp_path, "--split", "0.9")
    train, val = images_of(tmp_path / "train"), images_of(tmp_path / "val")
    assert (len(train), len(val)) == (18, 2) and not train.keys() & val.keys()
    assert (train | val)[photo_shards.jpeg(4)] == {"photo 4", "same 4"}
    said = capsys.readouterr().out
    assert f"--data {tmp_path / 'train'} --eval-data {tmp_path / 'val'}" in said


def test_names_and_order_of_the_rows_do_not_matter_and_the_seed_does(photos, tmp_path):
    other = tmp_path / "other"
    write_photos(other / "photos", range(20), "image-{}.jpg")
    rows = [(f"image-{i}.jpg", f"photo {i}") for i in range(20)]
    random.Random(0).shuffle(rows)
    write_captions(other / "captions.csv", rows)
    run(photos, tmp_path / "a", "--split", "0.5")
    run(other, tmp_path / "b", "--split", "0.5")
    run(photos, tmp_path / "c", "--split", "0.5", "--seed", "1")
    first, same, seed = (images_of(tmp_path / name / "val").keys() for name in "abc")
    assert len(first) == 10 and first == same != seed


def pair(image, id_, place="row"):
    return Pair(image, "caption", id_, place)


def test_equal_bytes_and_equal_ids_keep_images_together(tmp_path):
    write_photos(tmp_path, range(6))
    (tmp_path / "copy.jpg").write_bytes(photo_shards.jpeg(0))
    # 0 and its copy have equal bytes; the copy and 1 have equal ids: all three are one group.
    pairs = [pair("0.jpg", "a"), pair("copy.jpg", "b"), pair("1.jpg", "b")]
    pairs += [pair(f"{i}.jpg", f"{i}") for i in range(2, 6)]
    sides = set()
    for seed in range(8):
        train, val = split_by_image(pairs, 0.6, tmp_path, tmp_path, seed=seed)
        assert len({each in train for each in pairs[:3]}) == 1
        assert sorted([*train, *val], key=pairs.index) == pairs
        sides.add(pairs[0] in train)
    assert sides == {True, False}


def test_each_side_has_an_image_and_one_image_cannot_be_divided(tmp_path):
    write_photos(tmp_path, range(2))
    pairs = [pair("0.jpg", "0"), pair("1.jpg", "1")]
    assert [len(side) for side in split_by_image(pairs, 0.99, tmp_path, tmp_path)] == [1, 1]
    with pytest.raises(ValueError, match="share: expected at least 2 images to divide; got 1 in 2"):
        split_by_image([pairs[0], pairs[0]], 0.5, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="share: expected more than 0 and less than 1; got 1.0"):
        split_by_image(pairs, 1.0, tmp_path, tmp_path)


def test_what_may_be_broken_is_a_share_of_both_sides_together(photos, tmp_path, capsys):
    """One broken image of two for validation is not more than a tenth of all 20 rows."""
    folder = tmp_path / "mine"
    write_photos(folder / "photos", range(20))
    write_captions(folder / "captions.csv", [(f"{i}.jpg", f"photo {i}") for i in range(20)])
    run(folder, tmp_path / "good", "--split", "0.9")
    (number,) = [i for i in range(20) if photo_shards.jpeg(i) in images_of(tmp_path / "good/val")][
        :1
    ]
    broken = photo_shards.jpeg(number)[:200]
    for seed in range(40):  # until the broken one, which has other bytes, is for validation
        (folder / "photos" / f"{number}.jpg").write_bytes(broken + bytes([seed]))
        _, val = run(folder, tmp_path / f"broken-{seed}", "--split", "0.9")
        if val.broken:
            break
    assert len(val.broken) == 1 and val.count == 1
    assert "image cannot be decoded" in capsys.readouterr().out
    with pytest.raises(ValueError, match="max_broken: expected at most 0 broken rows"):
        run(folder, tmp_path / "strict", "--split", "0.9", "--max-broken", "0.01")


@pytest.mark.parametrize("split", [["1.5"], ["0"], ["0.9", "0.1"], ["nan"]])
def test_a_share_that_is_none_is_refused(photos, tmp_path, split, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["shards", str(photos / "captions.csv"), str(tmp_path), "--split", *split])
    shown = capsys.readouterr().err
    assert "split: expected one share between 0 and 1, such as 0.9, or names of splits" in shown
    assert f"; got {' '.join(split)}" in shown


def test_a_folder_of_photographs_that_is_not_there_is_named(photos, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["shards", str(photos / "captions.csv"), str(tmp_path), "--split", "0.9",
                  "--images", str(photos / "fotos")])  # fmt: skip
    assert f"there is no folder {photos / 'fotos'}" in capsys.readouterr().err


def test_the_folder_above_both_sides_names_them(photos, tmp_path):
    run(photos, tmp_path, "--split", "0.9")
    with pytest.raises(FileNotFoundError, match=r"there are some in .*/train and .*/val"):
        expand(tmp_path)


def test_a_folder_of_images_tells_how_shards_are_made(photos):
    with pytest.raises(
        FileNotFoundError, match="fastvlp shards captions.csv SHARDS --images .*/ph"
    ):
        expand(photos / "photos")
