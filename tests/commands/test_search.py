"""Searching a folder by a text and by an image: what is found, said and drawn."""

import pytest
import torch
from fastvlp_tests import photo_shards
from PIL import Image

import fastvlp
from fastvlp import cli
from fastvlp.commands.search import nearest, parse
from fastvlp.data.image_folder import encode_images, find_images
from fastvlp.data.images.integrity import ImageFault
from fastvlp.models import base, vilt


def search(run, photos, tmp_path, query, *more):
    return parse([str(run), query, "--images", str(photos), "--device", "cpu",
                  "--output", str(tmp_path / "found.png"), *more]).run()  # fmt: skip


def test_a_text_finds_the_images_of_the_highest_cosines(small_run, photos, tmp_path, capsys):
    hits = search(small_run, photos, tmp_path, "caption 3", "--top", "4")
    model, preprocess, tokenizer = fastvlp.create(small_run)
    with torch.inference_mode():
        text = model.encode_text(tokenizer(["caption 3"]))
        scores = {
            path: torch.cosine_similarity(text, model.encode_image(preprocess.read(path)[None]))
            for path in [*sorted(photos.glob("[0-9].jpg")), photos / "more" / "6.jpg"]
        }
    wanted = sorted(scores, key=lambda path: -scores[path].item())[:4]
    assert [hit.path for hit in hits] == wanted
    assert [hit.score for hit in hits] == pytest.approx(
        [scores[p].item() for p in wanted], abs=1e-5
    )
    shown = capsys.readouterr().out
    assert "7 images searched for 'caption 3'" in shown
    assert f"  1  {hits[0].score:6.3f}  {wanted[0].relative_to(photos)}" in shown
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 4 * 224


def test_unreadable_images_are_named_and_left_out(small_run, photos, tmp_path, capsys):
    search(small_run, photos, tmp_path, "caption 3", "--batch-size", "2")
    shown = capsys.readouterr().out
    assert "left out, because they cannot be read: 2 images\n" in shown
    assert "cut.jpg: the image cannot be decoded" in shown and "notes.png" in shown
    assert "encoding: 9 of 9 images, 2 unreadable" in shown


def test_an_image_finds_its_own_copy_first_and_never_itself(small_run, photos, tmp_path, capsys):
    (tmp_path / "like.jpg").write_bytes(photo_shards.jpeg(2))
    hits = search(small_run, photos, tmp_path, str(tmp_path / "like.jpg"))
    assert hits[0].path == photos / "2.jpg" and hits[0].score == pytest.approx(1, abs=1e-5)
    inside = search(small_run, photos, tmp_path, str(photos / "2.jpg"))
    assert photos / "2.jpg" not in [hit.path for hit in inside] and len(inside) == 6


def test_captions_are_printed_with_their_images(small_run, photos, tmp_path, capsys):
    (tmp_path / "captions.csv").write_text("path,caption\n0.jpg,an astronaut\nmore/6.jpg,a cup\n")
    search(small_run, photos, tmp_path, "caption 1", "--captions", str(tmp_path / "captions.csv"))
    shown = capsys.readouterr().out
    assert "0.jpg  an astronaut\n" in shown and "more/6.jpg  a cup\n" in shown


@pytest.mark.parametrize(
    ("query", "options", "message"),
    [
        ("bus.jpg", [], "query: expected a text or the file of an image, there is no bus.jpg"),
        ("{0}/notes.png", [], "query: {0}/notes.png: the image cannot be decoded"),
        ("a bus", ["--images", "{0}/none"], "images: expected a folder of images, there is no"),
        ("a bus", ["--images", "{0}/0.jpg"], "images: expected a folder of images, got the file"),
        ("a bus", ["--images", "{1}"], "images: expected images in {1}, with names that end in"),
        ("a bus", ["--top", "0"], "top: expected more than 0"),
    ],
)
def test_mistakes_are_named(small_run, photos, tmp_path, query, options, message, capsys):
    places = (photos, tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["search", str(small_run), query.format(*places), "--images", str(photos),
                  *(each.format(*places) for each in options)])  # fmt: skip
    assert message.format(*places) in capsys.readouterr().err


def test_a_model_whose_features_cannot_be_compared_is_refused(photos, tmp_path):
    base.save(vilt.create("tiny", vocab_size=20), tmp_path / "model")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(ValueError, match="model: expected a CLIP, .* got one of vilt"):
        search(tmp_path, photos, tmp_path, "a")


def test_a_model_that_is_not_there_is_named(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="model: expected the folder of a run or a check"):
        search(tmp_path / "runs" / "clp", photos, tmp_path, "a")


def test_equal_scores_keep_the_order_of_the_files(photos):
    paths = find_images(photos)
    hits = nearest(torch.ones(2), torch.ones(len(paths), 2), paths, 3)
    assert [hit.path for hit in hits] == paths[:3]


def test_nothing_that_can_be_read_is_an_error(small_run, photos):
    _, preprocess, _ = fastvlp.create(small_run)
    with pytest.raises(ValueError, match="expected at least one that can be read: .*cut.jpg"):
        encode_images([photos / "cut.jpg"], preprocess, torch.flatten)
    features, kept, faults = encode_images(
        find_images(photos), preprocess, lambda x: x.mean((2, 3)), batch_size=3
    )
    assert features.shape == (7, 3) and len(kept) == 7 and len(faults) == 2
    torch.testing.assert_close(features.norm(dim=1), torch.ones(7))
    assert all(isinstance(fault, ImageFault) for fault in faults)
