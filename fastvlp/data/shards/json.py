"""JSON files of pairs: COCO captions, Karpathy's splits, and lists of objects.

coco       {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
karpathy   {"images": [{"filename", "sentences": [{"raw"}], "split"}]}: dataset_coco.json,
           dataset_flickr30k.json
list       [{"image", "caption"}], or one such object in each line (.jsonl)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvlp.data.shards.columns import find_columns, row_pairs
from fastvlp.data.shards.pairs import Broken, Columns, Rows, malformed, open_text, pair

_EXPECTED = {
    "coco": 'COCO captions, an object with "images" (id, file_name) and "annotations" '
    "(image_id, caption)",
    "karpathy": 'Karpathy\'s splits, an object with "images" (filename, sentences, split)',
    "json": 'a list of objects with an image and a caption, [{"image": "a.jpg", "caption": "..."}]',
}


def read_json(path: Path, kind: str, columns: Columns, splits: Sequence[str]) -> Rows:
    """The pairs of a JSON file.

    Args:
        kind: "coco", "karpathy", or "json" for whichever it is.
        columns: for lists of objects.
        splits: those wanted of a file that has several.

    Raises:
        ValueError: the file as a whole is not of its kind, or which splits are wanted is unclear.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        _refuse_splits(path, splits)
        return _read_lines(path, columns)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _refusal(path, kind, error) from error
    images = content.get("images") if isinstance(content, dict) else None
    found = {"json": _is_list_of_objects(content)}
    found["coco"] = isinstance(images, list) and isinstance(content.get("annotations"), list)
    found["karpathy"] = isinstance(images, list) and any(
        isinstance(image, dict) and "sentences" in image for image in images
    )
    if kind != "json":
        found = {kind: found[kind]}
    chosen = next((name for name, fits in found.items() if fits), None)
    if chosen == "karpathy":
        return _read_karpathy(path, images, splits)
    _refuse_splits(path, splits)
    if chosen == "coco":
        return _read_coco(path, images, content["annotations"])
    if chosen == "json":
        places = (f"{path.name}, object {number}" for number in range(1, len(content) + 1))
        return _read_objects(list(zip(places, content, strict=True)), columns, path.name)
    raise _refusal(path, kind, f"it holds {type(content).__name__} {str(content)[:60]!r}")


def _refuse_splits(path: Path, splits: Sequence[str]) -> None:
    if splits:
        raise ValueError(f"split: expected none, {path.name} is not of Karpathy's; got {splits!r}")


def _refusal(path: Path, kind: str, reason: object) -> ValueError:
    wanted = _EXPECTED.values() if kind == "json" else [_EXPECTED[kind]]
    return ValueError(f"source: expected {'; or '.join(wanted)}; {path.name} is not: {reason}")


def _is_list_of_objects(content: Any) -> bool:
    return isinstance(content, list) and (not content or any(isinstance(e, dict) for e in content))


def _read_lines(path: Path, columns: Columns) -> Rows:
    objects: list[tuple[str, Any]] = []
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            place = f"{path.name}, line {number}"
            if not line.strip():
                continue
            try:
                objects.append((place, json.loads(line)))
            except (ValueError, RecursionError) as error:
                objects.append((place, malformed(place, f"no JSON: {error}: {line.strip()}")))
    return _read_objects(objects, columns, path.name)


def _read_objects(objects: list[tuple[str, Any]], columns: Columns, name: str) -> Rows:
    header = list(dict.fromkeys(key for _, row in objects if isinstance(row, dict) for key in row))
    if not objects:
        return
    image, caption, identity = find_columns(header, columns, name)
    for place, row in objects:
        if isinstance(row, Broken):
            yield row
        elif not isinstance(row, dict):
            yield malformed(place, f"expected an object; got {row!r:.80}")
        else:
            yield from row_pairs(place, row.get(image), row.get(caption), row.get(identity))


def _read_coco(path: Path, images: list, annotations: list) -> Rows:
    names: dict[int | str, str] = {}
    faults = []
    for number, image in enumerate(images, 1):
        try:
            key, name = image["id"], image["file_name"]
        except (KeyError, TypeError) as error:
            faults.append(malformed(f"{path.name}, image {number}", f"{error!r}"))
            continue
        if isinstance(key, (int, str)) and isinstance(name, str):
            names[key] = name
        else:
            place = f"{path.name}, image {number}"
            faults.append(malformed(place, f"id or file_name: got {key!r:.60}, {name!r:.60}"))
    if faults and not names:
        raise _refusal(path, "coco", f"{faults[0].place}: {faults[0].detail}")
    yield from faults
    for number, annotation in enumerate(annotations, 1):
        place = f"{path.name}, annotation {number}"
        try:
            image, caption = annotation["image_id"], annotation["caption"]
        except (KeyError, TypeError) as error:
            yield malformed(place, f"{error!r}")
            continue
        if not isinstance(image, (int, str)):
            yield malformed(place, f"image_id: expected a number or text; got {image!r:.80}")
        elif image not in names:
            yield Broken(place, "no image", f"there is no image with the id {image!r}")
        elif not isinstance(caption, str):
            yield malformed(place, f"caption: expected text; got {caption!r:.80}")
        else:
            yield pair(names[image], caption, str(image), place)


def _read_karpathy(path: Path, images: list, wanted: Sequence[str]) -> Rows:
    _check_splits(path, images, wanted)
    for number, image in enumerate(images, 1):
        place = f"{path.name}, image {number}"
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            yield malformed(place, f"expected an object with a filename; got {image!r:.80}")
            continue
        if wanted and image.get("split") not in wanted:
            continue
        sentences = image.get("sentences")
        if not isinstance(sentences, list) or not sentences:
            yield Broken(place, "no caption", "expected a list of sentences")
            continue
        folder = image.get("filepath")
        name = f"{folder}/{image['filename']}" if isinstance(folder, str) else image["filename"]
        identity = image.get("cocoid", image.get("imgid"))
        for at, sentence in enumerate(sentences, 1):
            raw = sentence.get("raw") if isinstance(sentence, dict) else None
            here = f"{place}, sentence {at}"
            if isinstance(raw, str):
                yield from row_pairs(here, name, raw, identity)
            else:
                yield malformed(here, f'expected an object with "raw" text; got {sentence!r:.80}')


def _check_splits(path: Path, images: list, wanted: Sequence[str]) -> None:
    held = Counter(str(image["split"]) for image in images if _has_split(image))
    counts = ", ".join(f"{name} ({count} images)" for name, count in held.items())
    for name in wanted:
        if name not in held:
            raise ValueError(f"split: expected some of {counts or 'none'}; got {name!r}")
    if len(held) > 1 and not wanted:
        raise ValueError(
            f"split: {path.name} holds {counts}; name those wanted (for training on COCO: "
            f"--split train restval)"
        )


def _has_split(image: Any) -> bool:
    return isinstance(image, dict) and "split" in image
