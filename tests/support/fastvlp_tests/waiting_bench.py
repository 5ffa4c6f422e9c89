"""A benchmark of next to nothing that reads a line of standard input after each comparison."""

import sys

import torch
from _harness import measure
from _harness.run import Run


def doubled(inputs):
    return lambda: {"twice": inputs * 2}


def main():
    args = measure.parser("a benchmark").parse_args()
    with Run(args, axis=("n", "size"), summary=lambda rows: f"{len(rows)} rows in all") as run:
        for n in (8, 16):
            run.add(
                *measure.compare(
                    "double",
                    [
                        measure.Implementation("fastvlp", doubled),
                        measure.Implementation("floor", doubled, bound=True, note="the sum alone"),
                    ],
                    lambda n=n: torch.eye(n),
                    lambda: torch.eye(2),
                    run.settings,
                    dtype="fp32",
                    shape={"n": n},
                    reference=lambda inputs: {"twice": inputs.double() * 2},
                    measure_memory=False,
                )
            )
            sys.stdin.readline()


if __name__ == "__main__":
    main()
