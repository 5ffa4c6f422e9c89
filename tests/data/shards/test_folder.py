"""Folders of images with text files: pairs in order, links, and what is broken."""

import os

import pytest

from fastvlp.data.shards.sources import Pair, read_pairs


def write(path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_folder_of_images_and_text_files(tmp_path):
    for name in ("b.jpg", "a/x.PNG", "a/y.webp", "a/empty.gif", "z.bmp", "z.png", "notes.md"):
        write(tmp_path / name, b"")
    write(tmp_path / "b.txt", "\ufeffone\r\n\n two \n")
    write(tmp_path / "a/x.txt", "café\u2028same line")
    write(tmp_path / "a/empty.txt", " \n")
    write(tmp_path / "z.txt", b"good\n\xff bad\n")
    write(tmp_path / "orphan.txt", "text")
    pairs, broken = read_pairs(tmp_path)
    assert pairs == [
        Pair("b.jpg", "one", "b.jpg", "b.txt, line 1"),
        Pair("b.jpg", "two", "b.jpg", "b.txt, line 3"),
        Pair("z.bmp", "good", "z.bmp", "z.txt, line 1"),
        Pair("z.png", "good", "z.png", "z.txt, line 1"),
        Pair("a/x.PNG", "café\u2028same line", "a/x.PNG", "a/x.txt, line 1"),
    ]
    assert [(row.place, row.fault) for row in broken] == [
        ("orphan.txt", "no image"),
        ("z.txt, line 2", "not UTF-8"),
        ("z.txt, line 2", "not UTF-8"),
        ("a/empty.gif", "empty caption"),
        ("a/y.webp", "no caption"),
    ]


def test_linked_folders_are_read_once_each(tmp_path):
    for name in ("a/x", "b/y", "c/deep/z"):
        write(tmp_path / f"{name}.jpg", b"")
        write(tmp_path / f"{name}.txt", name)
    source = tmp_path / "source"
    write(source / "own/w.jpg", b"")
    write(source / "own/w.txt", "own")
    for link, target in {
        "to_a": "../a", "to_b": "../b", "again": "../a", "round": ".", "own/up": "..",
        "to_c": "../c", "to_deep": "../c/deep", "gone": "../nowhere",
    }.items():  # fmt: skip
        os.symlink(target, source / link)
    pairs, broken = read_pairs(source)
    assert sorted(pair.caption for pair in pairs) == ["a/x", "b/y", "c/deep/z", "own"]
    assert (source / pairs[-1].image).exists()
    assert {(row.place, row.fault) for row in broken} == {
        ("to_a", "linked folder"), ("round", "linked folder"), ("own/up", "linked folder"),
        ("to_deep", "linked folder"), ("gone", "dead link"),
    }  # fmt: skip


def test_files_of_systems_and_about_the_others_are_passed_over(tmp_path):
    for name in ("a.jpg", "._a.jpg", "._a.txt", ".DS_Store", "README.txt", "Thumbs.db", "LICENSE"):
        write(tmp_path / name, b"\0")
    write(tmp_path / "a.txt", "one")
    pairs, broken = read_pairs(tmp_path)
    assert [pair.caption for pair in pairs] == ["one"] and not broken


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.jpg", b"")
    write(tmp_path / "a.txt", "one")
    (tmp_path / "shut").mkdir()
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(path) == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    pairs, broken = read_pairs(tmp_path)
    assert len(pairs) == 1
    assert [(row.place, row.fault) for row in broken] == [("shut", "unreadable folder")]


def test_a_folder_without_images_names_what_there_is(tmp_path):
    write(tmp_path / "pairs.csv", "path,caption\n")
    with pytest.raises(ValueError, match="expected images .* the first pairs.csv.*a list of pairs"):
        read_pairs(tmp_path)
