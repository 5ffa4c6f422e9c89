"""JSON sources: COCO captions, Karpathy's splits, lists of objects."""

import json

import pytest

from fastvlp.data.shards.sources import Columns, Pair, read_pairs


def write(path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


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


def test_one_bad_entry_of_coco_costs_itself(tmp_path):
    content = {
        "images": [
            {"id": 1, "file_name": "1.jpg"},
            {"id": [2], "file_name": "2.jpg"},
            {"id": 3},
            5,
        ],
        "annotations": [
            {"image_id": [1], "caption": "a list"},
            {"image_id": {"a": 1}, "caption": "an object"},
            "text",
            {"image_id": 1, "caption": "good"},
        ],
    }
    pairs, broken = read_pairs(write(tmp_path / "c.json", json.dumps(content)))
    assert pairs == [Pair("1.jpg", "good", "1", "c.json, annotation 4")]
    assert [row.place for row in broken] == [
        "c.json, image 2", "c.json, image 3", "c.json, image 4",
        "c.json, annotation 1", "c.json, annotation 2", "c.json, annotation 3",
    ]  # fmt: skip
    assert "image_id: expected a number or text; got [1]" in broken[3].detail


def karpathy(number, split, *texts, **more):
    sentences = [{"raw": text, "tokens": text.split(), "sentid": 0} for text in texts]
    return {"filename": f"{number}.jpg", "split": split, "sentences": sentences} | more


def test_karpathys_splits(tmp_path):
    images = [
        karpathy(1, "train", "one", "two ", filepath="val2014", cocoid=91),
        karpathy(2, "test", "three"),
        karpathy(3, "restval", "four", imgid=7),
        {"filename": "4.jpg", "split": "train", "sentences": [{"tokens": ["a"]}]},
        {"filename": "5.jpg", "split": "train", "sentences": []},
        {"split": "train"},
    ]
    path = write(tmp_path / "dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}))
    pairs, broken = read_pairs(path, splits=["train", "restval"])
    name = path.name
    assert pairs == [
        Pair("val2014/1.jpg", "one", "91", f"{name}, image 1, sentence 1"),
        Pair("val2014/1.jpg", "two", "91", f"{name}, image 1, sentence 2"),
        Pair("3.jpg", "four", "7", f"{name}, image 3, sentence 1"),
    ]
    assert [(row.place, row.fault) for row in broken] == [
        (f"{name}, image 4, sentence 1", "malformed row"),
        (f"{name}, image 5", "no caption"),
        (f"{name}, image 6", "malformed row"),
    ]
    with pytest.raises(ValueError, match=r"holds train \(4 images\), test.*--split train restval"):
        read_pairs(path)
    with pytest.raises(ValueError, match=r"split: expected some of train.*got 'val'"):
        read_pairs(path, splits=["val"])
    one = write(tmp_path / "one.json", json.dumps({"images": images[:1]}))
    assert len(read_pairs(one)[0]) == len(read_pairs(one, "karpathy")[0]) == 2
    with pytest.raises(ValueError, match="expected COCO captions"):
        read_pairs(one, "coco")


def test_lists_of_objects(tmp_path):
    rows = [
        {"image": "a.jpg", "caption": "one", "image_id": 7},
        {"image": "a.jpg", "caption": ["two", "three"], "image_id": "x"},
        {"image": "b.jpg"},
        {"image": {"bytes": "?"}, "caption": "four"},
        ["c.jpg", "five"],
        {"image": "c.jpg", "caption": "six"},
    ]
    pairs, broken = read_pairs(write(tmp_path / "t.json", "\ufeff" + json.dumps(rows)))
    assert [(p.image, p.caption, p.id) for p in pairs] == [
        ("a.jpg", "one", "7"), ("a.jpg", "two", "x"), ("a.jpg", "three", "x"),
        ("c.jpg", "six", "c.jpg"),
    ]  # fmt: skip
    assert [(row.place, row.fault) for row in broken] == [
        ("t.json, object 3", "empty caption"),
        ("t.json, object 4", "malformed row"),
        ("t.json, object 5", "malformed row"),
    ]
    text = "\n".join([json.dumps(rows[0]), "", "{no", json.dumps(rows[5])])
    pairs, broken = read_pairs(write(tmp_path / "t.jsonl", text))
    assert [(p.caption, p.place) for p in pairs] == [
        ("one", "t.jsonl, line 1"), ("six", "t.jsonl, line 4"),
    ]  # fmt: skip
    assert [row.place for row in broken] == ["t.jsonl, line 3"]
    path = write(tmp_path / "u.json", '[{"url": "a.jpg", "alt": "one"}]')
    assert len(read_pairs(path, columns=Columns("url", "alt"))[0]) == 1
    with pytest.raises(ValueError, match="image column: u.json has none of the usual names"):
        read_pairs(path)
