"""CSV, TSV and parquet: every row is a pair or is named."""

import csv
import io
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.data.shards.sources import Columns, Pair, read_pairs


def write(path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


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
    pairs, broken = read_pairs(path, quotes=True)
    assert pairs == [
        Pair("a.jpg", 'quoted, with "quotes"\nand a line', "7", f"t.{suffix}, line 2"),
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


@pytest.mark.parametrize("damage", ["footer", "row group", "none"])
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    path = tmp_path / "t.parquet"
    table = pyarrow.table({"image": [f"{i}.jpg" for i in range(99)], "text": ["a"] * 99})
    pyarrow.parquet.write_table(table, path, row_group_size=50)
    content = bytearray(path.read_bytes())
    if damage == "none":
        assert len(read_pairs(path)[0]) == 99
        return
    if damage == "footer":
        content = content[:-40]
    else:
        content[4:200] = b"\xff" * 196
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^source: .*t.parquet is no parquet file, is damaged"):
        read_pairs(path)


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path, monkeypatch):
    path = write(tmp_path / "t.parquet", b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[parquet\]"'):
        read_pairs(path)


def rows_of(path, **options):
    """(image, caption) of each pair, and (line, fault) of each broken row."""
    pairs, broken = read_pairs(path, **options)
    faults = [(int(row.place.rsplit(" ", 1)[1]), row.fault) for row in broken]
    return [(pair.image, pair.caption) for pair in pairs], faults


MORE = [(f"{i}.jpg", f"cap {i}") for i in range(20)]


def test_a_quote_in_a_tsv_is_a_character(tmp_path):
    rows = [("a.jpg", '"quoted start'), ("b.jpg", '"whole"'), ("c.jpg", '5" pipe'), *MORE]
    text = "path\tcaption\n" + "".join(f"{image}\t{caption}\n" for image, caption in rows)
    assert rows_of(write(tmp_path / "t.tsv", text)) == (rows, [])
    assert rows_of(write(tmp_path / "t.txt", text)) == (rows, [])
    quoted, broken = rows_of(tmp_path / "t.tsv", quotes=True)
    assert quoted == [("b.jpg", "whole"), *rows[2:]] and broken == [(2, "malformed row")]


@pytest.mark.parametrize(
    "line",
    ['b.jpg,"never closed', 'b.jpg,"closed", twice"', 'b.jpg,"closed" and on', 'b.jpg,"""'],
)
def test_a_quote_that_is_not_closed_in_a_csv_costs_its_line(tmp_path, line):
    more = "".join(f"{image},{caption}\n" for image, caption in MORE)
    text = f'path,caption\na.jpg,plain\n{line}\n{more}z.jpg,"a, ""b""\nand c"\nlast.jpg,end\n'
    pairs, broken = rows_of(write(tmp_path / "t.csv", text))
    assert pairs == [
        ("a.jpg", "plain"), *MORE, ("z.jpg", 'a, "b"\nand c'), ("last.jpg", "end"),
    ]  # fmt: skip
    assert broken == [(3, "malformed row")]


@pytest.mark.parametrize("end", ['inch 5"', 'so "it is" called'])
def test_a_later_quote_does_not_make_rows_a_caption(tmp_path, end):
    """The text between two quotes of different rows is a field as RFC 4180 has it."""
    rows = [*MORE, ("x.jpg", end), ("y.jpg", "after")]
    text = 'path,caption\nb.jpg,"quoted start\n' + "".join(f"{i},{c}\n" for i, c in rows)
    assert rows_of(write(tmp_path / "t.csv", text)) == (rows, [(2, "malformed row")])
    text = 'caption,path\n"quoted start,b.jpg\n' + "".join(f"{c},{i}\n" for i, c in rows)
    assert rows_of(write(tmp_path / "t.csv", text)) == (rows, [(2, "malformed row")])


def test_an_open_quote_of_a_large_file_is_given_up(tmp_path):
    text = 'path,caption\nb.jpg,"open\n' + "x,a caption that is long enough\n" * 50_000 + '"\n'
    pairs, broken = rows_of(write(tmp_path / "t.csv", text))
    assert len(pairs) == 50_000 and [line for line, _ in broken] == [2, 50_003]


paths = st.text(st.sampled_from('ab ",\téµ'), max_size=8)
texts = st.text(st.sampled_from('ab "\n\r,\t\u2028é'), max_size=8)


@settings(deadline=None)
@given(rows=st.lists(st.tuples(paths, texts), max_size=8))
def test_what_the_csv_module_writes_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    file = io.StringIO()
    csv.writer(file).writerows([("path", "caption"), *rows])
    path.write_bytes(file.getvalue().encode())
    wanted = [(i.strip(), c.strip()) for i, c in rows if i.strip() and c.strip()]
    pairs, broken = rows_of(path)
    assert pairs == wanted and len(pairs) + len(broken) == len(rows)


lines = st.text(st.sampled_from('a",'), max_size=8).map(lambda text: f"{text}.jpg,b")


@settings(deadline=None)
@given(lines=st.lists(lines, max_size=8))
def test_every_line_is_in_a_pair_or_named(tmp_path_factory, lines):
    """With a path in each line no pair is of several lines."""
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_text("path,caption\n" + "".join(f"{line}\n" for line in lines))
    pairs, broken = rows_of(path)
    assert len(pairs) + len(broken) == len(lines)


def test_ids_stay_as_they_are_written(tmp_path):
    path = write(tmp_path / "t.csv", "path,caption,image_id\na,b,7\na,b, 7\na,b,007\na,b, \n")
    assert [pair.id for pair in read_pairs(path)[0]] == ["7", " 7", "007", "a"]


def hugging_face(path, images, captions):
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = {"image": pyarrow.array(images, kind), "caption": pyarrow.array(captions)}
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=2)
    return path


def test_images_in_parquet_are_named_by_file_column_and_row(tmp_path):
    images = [{"bytes": b"1", "path": "a.jpg"}, {"bytes": b"2", "path": None}, None]
    hugging_face(tmp_path / "0.parquet", images, [["one", "two"], ["three"], ["", "four"]])
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [b"3"], "caption": ["five"]}), tmp_path / "1.parquet"
    )
    pairs, broken = read_pairs(tmp_path)
    assert [(p.image, p.caption, p.id, p.embedded.row) for p in pairs] == [
        ("a.jpg", "one", "", 0),
        ("a.jpg", "two", "", 0),
        ("0.parquet, row 2", "three", "", 1),
        ("0.parquet, row 3", "four", "", 2),
        ("1.parquet, row 1", "five", "", 0),
    ]
    assert {(p.embedded.file, p.embedded.column) for p in pairs} == {
        (str(tmp_path / "0.parquet"), "image"), (str(tmp_path / "1.parquet"), "image"),
    }  # fmt: skip
    assert [(row.place, row.fault) for row in broken] == [("0.parquet, row 3", "empty caption")]


def test_images_in_parquet_go_before_the_names_they_once_had(tmp_path):
    table = {"filepath": ["old.jpg"], "image": [b"1"], "thumb": [b"2"], "caption": ["one"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    (pair,) = read_pairs(tmp_path / "t.parquet")[0]
    assert pair.embedded.column == "image"
    (pair,) = read_pairs(tmp_path / "t.parquet", columns=Columns("filepath"))[0]
    assert pair.embedded is None and pair.image == "old.jpg"


def test_a_field_that_is_no_text_is_named(tmp_path):
    table = {"image": ["a.jpg", "b.jpg"], "caption": [{"raw": "x"}, None], "image_id": [1.5, None]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    pairs, broken = read_pairs(tmp_path / "t.parquet")
    assert not pairs
    assert [row.fault for row in broken] == ["malformed row", "empty caption"]
    assert "caption: expected text or a list of texts; got {'raw': 'x'}" in broken[0].detail


def test_tables_beside_images_leave_a_folder_a_folder(tmp_path):
    hugging_face(tmp_path / "00000.parquet", [None], ["one"])
    write(tmp_path / "00000/a.jpg", b"")
    write(tmp_path / "00000/a.txt", "beside")
    pairs, _ = read_pairs(tmp_path)
    assert [pair.caption for pair in pairs] == ["beside"]
