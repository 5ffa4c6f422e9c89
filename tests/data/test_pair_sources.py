"""Every kind of source gives its pairs in order and names what is broken."""

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from fastvlp.data.pair_sources import Broken, Columns, Pair, read_pairs


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


@pytest.mark.parametrize(("suffix", "comma"), [("csv", ","), ("tsv", "\t"), ("txt", "\t")])
def test_tables(tmp_path, suffix, comma):
    rows = [
        ["number", "FilePath", "caption", "image_id"],
        ["1", "a.jpg", '"quoted, with ""quotes""\nand a line"', "7"],
        ["2", "a.jpg", "second", "7"],
        ["3", "b.jpg", "no id", ""],
        ["4", "", "no path", "8"],
        ["5", "c.jpg", "  ", "9"],
        ["6", "d.jpg"],
    ]
    text = "\ufeff" + "\r\n".join(comma.join(row) for row in rows)
    path = write(
        tmp_path / f"t.{suffix}", text.encode() + b"\n\n7" + f"{comma}e".encode() + b"\xe9"
    )
    with open(path, "ab") as file:
        file.write(f".jpg{comma}latin{comma}1\n".encode())
    pairs, broken = read_pairs(path)
    assert pairs == [
        Pair("a.jpg", 'quoted, with "quotes"\nand a line', "7", f"t.{suffix}, line 3"),
        Pair("a.jpg", "second", "7", f"t.{suffix}, line 4"),
        Pair("b.jpg", "no id", "b.jpg", f"t.{suffix}, line 5"),
    ]
    assert [(row.place, row.fault) for row in broken] == [
        (f"t.{suffix}, line 6", "no image path"),
        (f"t.{suffix}, line 7", "empty caption"),
        (f"t.{suffix}, line 8", "malformed row"),
        (f"t.{suffix}, line 10", "not UTF-8"),
    ]


def test_columns_by_name(tmp_path):
    path = write(tmp_path / "t.csv", "caption,alt,url,group\nx,y,z.jpg,g\n")
    pairs, _ = read_pairs(path, columns=Columns("url", "alt", "group"))
    assert pairs == [Pair("z.jpg", "y", "g", "t.csv, line 2")]
    with pytest.raises(
        ValueError, match=r"image column: .* none of the usual names .*caption, alt"
    ):
        read_pairs(path)
    with pytest.raises(ValueError, match=r"id column: expected one of caption, alt.*got 'nr'"):
        read_pairs(path, columns=Columns("url", "alt", "nr"))


def test_parquet(tmp_path):
    table = {
        "image": ["a.jpg", "a.jpg", None, "b.jpg"],
        "blob": [b"x"] * 4,
        "text": ["one", "two", "three", None],
        "image_id": [5, 5, 6, 7],
    }
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=2)
    pairs, broken = read_pairs(path)
    assert pairs == [
        Pair("a.jpg", "one", "5", "t.parquet, row 1"),
        Pair("a.jpg", "two", "5", "t.parquet, row 2"),
    ]
    assert [(row.place, row.fault) for row in broken] == [
        ("t.parquet, row 3", "no image path"),
        ("t.parquet, row 4", "empty caption"),
    ]


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path, monkeypatch):
    path = write(tmp_path / "t.parquet", b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'pip install "fastvlp\[parquet\]"'):
        read_pairs(path)


def test_coco(tmp_path):
    content = {
        "images": [{"id": 9, "file_name": "9.jpg"}, {"id": 3, "file_name": "3.jpg"}],
        "annotations": [
            {"image_id": 3, "id": 1, "caption": "A three.\n"},
            {"image_id": 9, "id": 2, "caption": "A nine."},
            {"image_id": 3, "id": 3, "caption": "Three again."},
            {"image_id": 4, "id": 4, "caption": "Nobody."},
            {"image_id": 3, "id": 5},
            {"image_id": 3, "id": 6, "caption": None},
            {"image_id": 3, "id": 7, "caption": ""},
        ],
    }
    pairs, broken = read_pairs(write(tmp_path / "c.json", json.dumps(content)))
    assert pairs == [
        Pair("3.jpg", "A three.", "3", "c.json, annotation 1"),
        Pair("9.jpg", "A nine.", "9", "c.json, annotation 2"),
        Pair("3.jpg", "Three again.", "3", "c.json, annotation 3"),
    ]
    faults = ["no image", "malformed row", "malformed row", "empty caption"]
    assert [row.fault for row in broken] == faults
    for other in ("{}", "[1]", "no json", '{"images": [{"id": 1}], "annotations": []}'):
        with pytest.raises(ValueError, match="expected COCO captions"):
            read_pairs(write(tmp_path / "c.json", other))


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
        ValueError, match="cannot tell what data.bin is; give its kind: folder, csv"
    ):
        read_pairs(write(tmp_path / "data.bin", ""))
    with pytest.raises(ValueError, match="kind: expected one of folder"):
        read_pairs(tmp_path, kind="zip")
    with pytest.raises(ValueError, match="image column: empty.csv has none"):
        read_pairs(write(tmp_path / "empty.csv", ""))
