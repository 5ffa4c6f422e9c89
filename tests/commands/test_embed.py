"""Features of images and texts as files: whose they are, and that they are the model's."""

import numpy as np
import pyarrow.parquet
import pytest
import torch

import fastvlp
from fastvlp import cli
from fastvlp.data.image_folder import encode_images


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.txt").write_text("caption 3\n\n  caption 1 \n", encoding="utf-8")
    return tmp_path / "texts.txt"


def embed(run, output, *options):
    cli.main(["embed", str(run), str(output), "--device", "cpu", *map(str, options)])


def test_npz_has_features_of_images_and_texts(small_run, photos, texts, tmp_path, capsys):
    embed(small_run, tmp_path / "out" / "f.npz", "--images", photos, "--texts", texts,
          "--batch-size", 4)  # fmt: skip
    shown = capsys.readouterr().out
    assert "7 images and 2 texts in" in shown and "left out: " in shown and "cut.jpg" in shown
    found = np.load(tmp_path / "out" / "f.npz")
    model, preprocess, tokenizer = fastvlp.create(small_run)
    names = [*(f"{i}.jpg" for i in range(6)), "more/6.jpg"]
    assert found["image_names"].tolist() == names and found["texts"].tolist() == [
        "caption 3", "caption 1",
    ]  # fmt: skip
    wanted, _, _ = encode_images([photos / n for n in names], preprocess, model.encode_image)
    np.testing.assert_allclose(found["images"], wanted.numpy(), atol=1e-6)
    with torch.inference_mode():
        text = torch.nn.functional.normalize(model.encode_text(tokenizer(["caption 3"])), dim=-1)
    np.testing.assert_allclose(found["text_features"][:1], text.numpy(), atol=1e-6)
    assert found["images"].dtype == found["text_features"].dtype == np.float32


def test_parquet_has_a_row_for_each(small_run, texts, photos, tmp_path):
    embed(small_run, tmp_path / "f.parquet", "--texts", texts, "--images", photos)
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert table["kind"] == ["image"] * 7 + ["text"] * 2
    assert table["name"][-2:] == ["caption 3", "caption 1"]
    assert np.linalg.norm(table["features"], axis=1) == pytest.approx(np.ones(9), abs=1e-5)


def test_texts_alone_need_no_images(small_run, texts, tmp_path):
    embed(small_run, tmp_path / "f.npz", "--texts", texts, "--no-progress")
    found = np.load(tmp_path / "f.npz")
    assert found["images"].shape == (0, 16) and found["text_features"].shape == (2, 16)


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("f.csv", ["--texts", "{0}"], "output: expected a name in .npz or .parquet, got"),
        ("f.npz", [], "images, texts: expected --images FOLDER, --texts FILE or both"),
        ("f.npz", ["--texts", "{1}"], "texts: expected a text in each line of"),
    ],
)
def test_mistakes_are_named(small_run, texts, tmp_path, output, options, message, capsys):
    (tmp_path / "empty.txt").write_text("\n\n")
    options = [each.format(texts, tmp_path / "empty.txt") for each in options]
    with pytest.raises(SystemExit, match="2"):
        embed(small_run, tmp_path / output, *options)
    assert message in capsys.readouterr().err and not (tmp_path / output).exists()
