"""Heat maps of texts over an image: what is computed, said and drawn."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image

import fastvlp
from fastvlp import cli
from fastvlp.commands.ground import enlarge, overlay, parse, upright
from fastvlp.models import albef, base
from fastvlp.models.albef.tasks.grounding import grounding_maps
from fastvlp.models.albef.tasks.retrieval import AlbefRetrieval

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red bus on the left".split()


@pytest.fixture(scope="module")
def albef_run(tmp_path_factory):
    """What a run of ALBEF leaves: weights that look at the image, a vocabulary, settings."""
    folder = tmp_path_factory.mktemp("albef")
    torch.manual_seed(0)
    model = albef.create("tiny", vocab_size=len(WORDS), init_by_width=True)
    base.save(model, folder / "model")
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    (folder / "config.yaml").write_text("data: mine\neval_data: null\n")
    return folder


def ground(run, image, tmp_path, *texts, options=()):
    return parse([str(run), str(image), *texts, "--device", "cpu",
                  "--out", str(tmp_path / "map.png"), *options]).run()  # fmt: skip


@pytest.mark.parametrize(("options", "layer"), [((), 3), (("--layer", "2"), 2)])
def test_each_text_gets_the_map_of_grounding_maps(albef_run, photos, tmp_path, options, layer):
    found = ground(albef_run, photos / "0.jpg", tmp_path, "a red bus", "left", options=options)
    model, preprocess, tokenizer = fastvlp.create(albef_run)
    with Image.open(photos / "0.jpg") as photo:
        width, height = photo.size
    words = tokenizer.padded(["a red bus", "left"])
    image = preprocess.read(photos / "0.jpg")[None]
    maps, matches = grounding_maps(
        model, image, words.ids, words.mask, [0, 0], layer=layer, return_match=True
    )
    assert [each.text for each in found] == ["a red bus", "left"]
    assert [each.match for each in found] == matches.tolist()
    large = F.interpolate(maps[None], size=(height, width), mode="bicubic")[0].clamp(min=0)
    for each, wanted in zip(found, large, strict=True):
        assert wanted.max() > 0 and each.heat.shape == (height, width)
        torch.testing.assert_close(each.heat, wanted / wanted.max())
        column, row = each.warmest()
        assert each.heat[row, column] == 1
    assert not torch.equal(found[0].heat, found[1].heat)


def test_what_is_said_and_drawn(albef_run, photos, tmp_path, capsys):
    found = ground(albef_run, photos / "0.jpg", tmp_path, "a red bus", "left")
    said = capsys.readouterr().out
    column, row = found[0].warmest()
    assert f"{found[0].match:7.3f}  x {column:4}, y {row:4}  a red bus\n" in said
    assert f"the maps are in {tmp_path / 'map.png'}\n" in said
    with Image.open(tmp_path / "map.png") as sheet:
        assert sheet.format == "PNG"
        # The image and two maps side by side, each 384 pixels wide with 12 between them.
        assert sheet.width == 12 + 3 * 396
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    images = [pixels[60:260, 12 + 396 * at : 396 * (at + 1)] for at in range(3)]
    assert all(np.abs(images[0] - each).mean() > 5 for each in images[1:])


def test_an_image_much_wider_than_high_is_drawn(albef_run, tmp_path):
    Image.new("RGB", (3000, 3), "red").save(tmp_path / "thin.png")
    (found,) = ground(albef_run, tmp_path / "thin.png", tmp_path, "red")
    assert found.heat.shape == (3, 3000)
    with Image.open(tmp_path / "map.png") as sheet:
        assert sheet.width == 12 + 2 * 396


def test_an_overlay_hides_the_image_where_the_map_is_high():
    image = Image.new("RGB", (2, 1), (200, 100, 50))
    left, right = np.asarray(overlay(image, torch.tensor([[0.0, 1.0]])))[0].tolist()
    assert left == [200, 100, 50]
    warm = 255 * np.array(colormaps["turbo"](1.0)[:3])
    np.testing.assert_allclose(right, 0.3 * np.array([200, 100, 50]) + 0.7 * warm, atol=0.5)


def test_maps_are_scaled_to_1_and_an_empty_one_stays_empty():
    maps = torch.zeros(2, 4, 4)
    maps[1, 0, 3] = 0.02
    large = enlarge(maps, (20, 12))
    assert large.shape == (2, 12, 20) and large.min() == 0
    assert not large[0].any() and large[1].max() == 1
    assert divmod(int(large[1].argmax()), 20) == (0, 19)


def test_an_image_is_turned_as_its_camera_says(albef_run, tmp_path):
    generator = np.random.default_rng(0)
    upright = Image.fromarray(generator.integers(0, 256, (60, 80, 3), np.uint8))
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    ours, wanted = (
        ground(albef_run, tmp_path / name, tmp_path, "red")[0]
        for name in ("turned.png", "upright.png")
    )
    assert ours.match == wanted.match and torch.equal(ours.heat, wanted.heat)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}/no.jpg", "a bus"], "image: expected the file of an image, there is no {0}/no.jpg"),
        (["{0}", "a bus"], "image: expected the file of an image, got the folder {0}"),
        (["{0}/cut.jpg", "a bus"], "image: {0}/cut.jpg: the image cannot be decoded"),
        (["{0}/0.jpg", ""], "texts: expected words in each text, got ''"),
        (["{0}/0.jpg", "red", "..."], "texts: expected words in each text, got '...'"),
        (["{0}/0.jpg"], "texts: expected at least one text, got none"),
        (["{0}/0.jpg", "red", "--layer", "1"], "layer: expected a fusion layer, 2 to 3, got 1"),
        (["{0}/0.jpg", "red", "--layer", "-1"], "layer: expected 0 or more, got -1"),
    ],
)
def test_mistakes_are_named(albef_run, photos, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["ground", str(albef_run), *(each.format(photos) for each in arguments)])
    assert message.format(photos) in capsys.readouterr().err
    assert not (tmp_path / "ground.png").exists()


def test_other_models_are_refused(small_run, photos, tmp_path):
    with pytest.raises(ValueError, match="model: expected an ALBEF, .* got one of clip"):
        ground(small_run, photos / "0.jpg", tmp_path, "a bus")
    with pytest.raises(FileNotFoundError, match="model: expected the folder of a run or a check"):
        ground(tmp_path / "nowhere", photos / "0.jpg", tmp_path, "a bus")


def test_greys_of_16_bits_have_the_range_of_their_format(albef_run, tmp_path):
    greys = np.arange(60 * 80, dtype=np.int32).reshape(60, 80)  # of 65,536, so nearly black
    Image.fromarray(greys).save(tmp_path / "deep.pgm")
    found = np.asarray(upright(tmp_path / "deep.pgm", fastvlp.create(albef_run)))
    assert found.shape == (60, 80, 3) and found.max() == round(greys.max() * 255 / 65535)


def test_a_model_fine_tuned_for_retrieval_is_one_too(albef_run, photos, tmp_path):
    model = base.load(albef_run / "model")
    tuned = AlbefRetrieval(dataclasses.replace(model.config, pretraining=False))
    tuned.student.load_state_dict(model.student.state_dict())
    tuned.itm_head.load_state_dict(model.itm_head.state_dict())
    folder = tmp_path / "tuned"
    folder.mkdir()
    base.save(tuned, folder / "model")
    for name in ("vocab.txt", "config.yaml"):
        (folder / name).write_text((albef_run / name).read_text())
    wanted, found = (ground(run, photos / "0.jpg", tmp_path, "left") for run in (albef_run, folder))
    assert torch.equal(found[0].heat, wanted[0].heat)
