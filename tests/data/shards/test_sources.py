"""What a source is, and Flickr30k's annotations; tables, JSON and folders have their own tests."""

import pytest

from fastvlp.data.shards.sources import Broken, Pair, read_pairs


def write(path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_flickr30k_token_file(tmp_path):
    text = "1.jpg#0\tA dog runs .\n1.jpg#1\tA tab\tinside .\n2.jpg#0 no tab\n2.jpg#1\t\n"
    pairs, broken = read_pairs(write(tmp_path / "results.token", text))
    assert pairs == [
        Pair("1.jpg", "A dog runs .", "1", "results.token, line 1"),
        Pair("1.jpg", "A tab\tinside .", "1", "results.token, line 2"),
    ]
    assert broken == [
        Broken("results.token, line 3", "malformed row", "2.jpg#0 no tab"),
        Broken("results.token, line 4", "empty caption", "2.jpg"),
    ]


def test_flickr30k_csv(tmp_path):
    text = (
        "image_name| comment_number| comment\r\n"
        '1.jpg| 0| Two "young" guys | talk .\r\n'
        "2199200615.jpg| 4   A dog runs across the grass .\r\n"
    )
    pairs, broken = read_pairs(write(tmp_path / "results.csv", text))
    assert pairs == [Pair("1.jpg", 'Two "young" guys | talk .', "1", "results.csv, line 2")]
    assert [(row.place, row.fault) for row in broken] == [("results.csv, line 3", "malformed row")]


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        read_pairs(tmp_path / "missing.csv")
    with pytest.raises(
        ValueError, match="cannot tell what data.bin is; give its kind .--kind.: folder, csv"
    ):
        read_pairs(write(tmp_path / "data.bin", ""))
    with pytest.raises(ValueError, match="kind: expected one of folder"):
        read_pairs(tmp_path, kind="zip")
    with pytest.raises(ValueError, match="image column: empty.csv has none"):
        read_pairs(write(tmp_path / "empty.csv", ""))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("a.tar", "is an archive; unpack it and give the folder.*--data"),
        ("a.tar.gz", "is an archive; unpack it"),
        ("a.zip", "is an archive; unpack it"),
        ("a.csv.gz", "is compressed; decompress it first"),
    ],
)
def test_archives_say_what_to_do(tmp_path, name, word):
    with pytest.raises(ValueError, match=word):
        read_pairs(write(tmp_path / name, ""))


def test_splits_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="split: expected none of a source of the kind csv"):
        read_pairs(write(tmp_path / "a.csv", "path,caption\n"), splits=["train"])
    with pytest.raises(ValueError, match="split: expected none, a.json is not"):
        read_pairs(write(tmp_path / "a.json", '[{"image": "a", "caption": "b"}]'), splits=["x"])
