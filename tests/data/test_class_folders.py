"""Which images a folder of classes holds."""

import os

import pytest

from fastvlp.data import class_folders


def test_hidden_files_are_passed_over_and_linked_folders_read(tmp_path):
    for name in ("a/1.jpg", "a/._1.jpg", "a/deep/2.PNG", "a/notes.txt", ".trash/3.jpg"):
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
    assert names == {"a": ["a/1.jpg", "a/deep/2.PNG", "a/more/4.jpg"], "b": ["b/4.jpg"]}


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
