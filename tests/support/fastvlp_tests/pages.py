"""The documents of the checkout: their blocks of code and the commands in them."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
INTEGRATIONS = ROOT / "docs" / "integrations.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^##+ (.+)$", re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language, in its order."""
    return [text for name, text in _BLOCK.findall(page.read_text()) if name == language]


def sections(page: Path) -> Iterator[tuple[str, str]]:
    """(title, python block) of every block of a page, under the nearest section's title."""
    text = page.read_text()
    titles = [(match.start(), match[1]) for match in _SECTION.finditer(text)]
    for match in _BLOCK.finditer(text):
        if match[1] == "python":
            above = [title for start, title in titles if start < match.start()]
            yield (above[-1] if above else ""), match[2]


def commands(page: Path) -> list[str]:
    """Every command line of a page's console blocks, continued lines joined."""
    text = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    return [part.strip() for line in text.splitlines() for part in line.split("&&") if part.strip()]
