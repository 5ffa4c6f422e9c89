"""How many kernel cases a run interpreted, executed as PTX and compiled, for its summary.

A test takes the fixture `kernel_counts` and says what it did:

    def test_a_tile(kernel_counts):
        ...
        kernel_counts.executed(90)

A case is one kernel at one setting, by default the test itself; a test of several cases names
each. The same case told twice counts once, and only the cases of tests that passed count.
"""

from collections import Counter
from collections.abc import Iterable

# Of the properties that pytest keeps with a test's report.
PROPERTY = "kernel case"
_WORDS = {
    "interpreted": "interpreted",
    "executed": "executed as PTX",
    "launched": "launched on a GPU",
    "compiled": "compiled",
}


class Recorder:
    """Notes the kernel cases of one test in its report's properties.

    `capability` is the target as one number: 80, 90, 100, 120.
    """

    def __init__(self, properties: list[tuple[str, object]]):
        self._properties = properties

    def interpreted(self, case: str = "") -> None:
        self._record("interpreted", "", case)

    def executed(self, capability: int, case: str = "") -> None:
        self._record("executed", f"sm_{capability}", case)

    def launched(self, case: str = "") -> None:
        self._record("launched", "", case)

    def compiled(self, capability: int, case: str = "") -> None:
        self._record("compiled", f"sm_{capability}", case)

    def _record(self, kind: str, target: str, case: str) -> None:
        entry = (PROPERTY, "|".join((kind, target, case)))
        if entry not in self._properties:
            self._properties.append(entry)


def summary(reports: Iterable) -> str:
    """The cases of the reports of passed tests in one line; empty where there are none.

    kernel cases: 312 interpreted, 140 executed as PTX (sm_80 70, sm_90 70)
    """
    cases = set()
    for report in reports:
        if report.when == "call":
            told = [value for name, value in report.user_properties if name == PROPERTY]
            for kind, target, case in (value.split("|", 2) for value in told):
                cases.add((kind, target, case or report.nodeid))
    counts = Counter((kind, target) for kind, target, _ in cases)
    parts = []
    for kind, words in _WORDS.items():
        targets = {target: n for (of, target), n in counts.items() if of == kind}
        if targets:
            named = sorted((int(t.removeprefix("sm_")), n) for t, n in targets.items() if t)
            by_target = ", ".join(f"sm_{target} {n}" for target, n in named)
            parts.append(f"{sum(targets.values())} {words}" + f" ({by_target})" * bool(by_target))
    return "kernel cases: " + ", ".join(parts) if parts else ""
