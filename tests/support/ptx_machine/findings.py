"""What observers of an execution report, one entry for each place in the program."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from .errors import HazardError


@dataclass
class Finding:
    """kind is a short name ("shared race"), text says what happened where, count how often."""

    kind: str
    text: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}" + (f" ({self.count} times)" if self.count > 1 else "")


@dataclass
class Findings:
    """Findings by kind and place: of each the first is told, the others are counted."""

    found: dict[tuple, Finding] = field(default_factory=dict)

    def add(self, kind: str, place: tuple, count: int, text) -> None:
        """text is called for the first one only."""
        key = (kind, *place)
        if key in self.found:
            self.found[key].count += count
        else:
            self.found[key] = Finding(kind, text(), count)

    @property
    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.found.values()}

    def __iter__(self):
        return iter(self.found.values())


def require_none(findings: Iterable[Finding]) -> None:
    """Raise HazardError if there are any."""
    found = list(findings)
    if found:
        raise HazardError("\n".join(["the PTX machine found hazards:", *map(str, found)]))
