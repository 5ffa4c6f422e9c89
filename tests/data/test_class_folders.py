"""Which images a folder of classes holds."""

import os

import pytest
import torch
from fastvlp_tests import photo_shards
from PIL import Image

from fastvlp.data import RgbConversion, class_folders
from fastvlp.data.images.integrity import ImageFault


def test_hidden_files_are_passed_over_and_linked_folders_read(tmp_path):
    for name in ("a/1.jpg", "a/._1.jpg", "a/3.tif", "a/deep/2.PNG", "a/notes.txt", ".trash/3.jpg"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "4.jpg").write_bytes(b"")
    os.symlink("../../more", tmp_path / "set/a/more")
    os.symlink(".", tmp_path / "set/a/round")
    os.symlink("../more", tmp_path / "set/b")
    found = class_folders.find(tmp_path / "set")
    names = {
        label: [path.relative_to(tmp_path / "set").as_posix() for path in paths]
        for label, paths in found.items()
    }
    assert names == {"a": ["a/1.jpg", "a/3.tif", "a/deep/2.PNG", "a/more/4.jpg"], "b": ["b/4.jpg"]}


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a" / "shut").mkdir(parents=True)
    (tmp_path / "a" / "1.jpg").write_bytes(b"")
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(path) == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(OSError, match="shut cannot be read: Permission denied"):
        class_folders.find(tmp_path)


def test_a_file_that_cannot_be_read_costs_only_itself(tmp_path):
    (tmp_path / "good.png").write_bytes(photo_shards.encoded(Image.new("RGB", (8, 8)), "PNG"))
    (tmp_path / "dead.jpg").symlink_to("gone.jpg")
    with pytest.raises(ImageFault, match="dead.jpg: No such file or directory"):
        class_folders.read(tmp_path / "dead.jpg", 8, (0.0,) * 3, (1.0,) * 3)
    labelled = [(tmp_path / "dead.jpg", 0), (tmp_path / "good.png", 1)]
    with pytest.warns(UserWarning, match="1 of 2 left out; .*dead.jpg: No such file"):
        features, labels = class_folders.encode(
            labelled, lambda images: images.flatten(1), 8, 2, torch.device("cpu")
        )
    assert labels.tolist() == [1] and features.shape == (1, 3 * 8 * 8)


def test_transparent_pixels_get_the_background_that_is_asked_for(tmp_path):
    clear = Image.new("RGBA", (8, 8), (0, 0, 255, 0))
    (tmp_path / "a.png").write_bytes(photo_shards.encoded(clear, "PNG"))
    red = RgbConversion("red")
    found = class_folders.read(tmp_path / "a.png", 8, (0.0,) * 3, (1.0,) * 3, red)
    assert found.amax((1, 2)).tolist() == [1.0, 0.0, 0.0]
