"""The shapes of a sweep: which benchmark measures them, and with what flags."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

# Rounds: many of what takes under a millisecond, a few of what takes seconds.
SMALL, MIDDLE, LARGE = 25, 9, 3


@dataclass(frozen=True)
class Cell:
    """One call of a benchmark's `main`, which measures every dtype and phase of one shape.

    The longest ones are measured `once`, under the first instruction set alone.
    """

    op: str
    script: str
    flags: tuple[str, ...]
    rounds: int
    once: bool = False


def cells(quick: bool) -> list[Cell]:
    """From one row to the sizes of the other benchmarks; a few of them if quick."""
    return list(_quick() if quick else _whole())


def _once(cell: Cell) -> Cell:
    return replace(cell, once=True)


def _quick() -> Iterator[Cell]:
    yield _contrastive(64, SMALL)
    yield _attention("cross", 1, 30, SMALL)
    yield _attention("self", 4, 30, SMALL)
    yield _momentum(4, 1024, SMALL)
    yield _soft_cross_entropy(4, LARGE)
    yield _word_patch(4, SMALL)
    yield _ema(0, SMALL)
    yield _matmul(30, SMALL)


def _whole() -> Iterator[Cell]:
    for n, rounds in ((2, SMALL), (32, SMALL), (256, SMALL), (1024, MIDDLE)):
        yield _contrastive(n, rounds)
    yield _once(_contrastive(4096, LARGE))
    for images, queries, rounds in (
        (1, 1, SMALL), (1, 30, SMALL), (4, 30, SMALL), (4, 120, MIDDLE), (32, 30, LARGE),
    ):  # fmt: skip
        yield _attention("cross", images, queries, rounds)
    yield _once(_attention("cross", 32, 120, LARGE))
    for texts, rounds in ((1, SMALL), (4, SMALL), (32, SMALL), (128, MIDDLE)):
        yield _attention("self", texts, 30, rounds)
    for batch, queue, rounds in (
        (1, 64, SMALL), (4, 1024, SMALL), (16, 8192, SMALL), (64, 65536, LARGE),
    ):  # fmt: skip
        yield _momentum(batch, queue, rounds)
    for rows in (1, 16, 120):
        yield _soft_cross_entropy(rows, LARGE)
    yield _once(_soft_cross_entropy(1000, LARGE))
    for pairs, rounds in ((1, SMALL), (4, SMALL), (16, SMALL), (64, LARGE)):
        yield _word_patch(pairs, rounds)
    for blocks, rounds in ((0, MIDDLE), (2, LARGE)):
        yield _ema(blocks, rounds)
    yield _once(_ema(12, LARGE))
    for rows, rounds in ((1, SMALL), (30, SMALL), (240, SMALL), (788, MIDDLE), (3152, LARGE)):
        yield _matmul(rows, rounds)


def _contrastive(n: int, rounds: int) -> Cell:
    flags = ("--n", str(n), "--memory-n=", "--features", "random", "--error-n", "1024")
    return Cell("contrastive", "itc_throughput", flags, rounds)


def _attention(part: str, images: int, queries: int, rounds: int) -> Cell:
    flags = (
        "--part", part, "--images", str(images), "--queries", str(queries),
        "--phase", "fwd,fwd+bwd", "--no-compile",
    )  # fmt: skip
    return Cell(f"{part}_attention", "cross_attention", flags, rounds)


def _momentum(batch: int, queue: int, rounds: int) -> Cell:
    flags = ("--batch", str(batch), "--queue", str(queue), "--no-compile")
    return Cell("momentum_contrastive", "momentum_contrastive", flags, rounds)


def _soft_cross_entropy(rows: int, rounds: int) -> Cell:
    # Quick is without peers at settings that lose to those which remain.
    flags = ("--rows", str(rows), "--no-compile", "--quick")
    return Cell("soft_cross_entropy", "soft_cross_entropy", flags, rounds)


def _word_patch(pairs: int, rounds: int) -> Cell:
    flags = (
        "--pairs", str(pairs), "--text", "full", "--dtype", "fp32", "bf16", "--layers", "0",
        "--no-compile",
    )  # fmt: skip
    return Cell("word_patch_alignment", "word_patch_alignment", flags, rounds)


def _ema(blocks: int, rounds: int) -> Cell:
    return Cell("ema", "ema", ("--blocks", str(blocks)), rounds)


def _matmul(rows: int, rounds: int) -> Cell:
    return Cell("matmul", "matmul", ("--rows", str(rows), "--layers", "384x1536,768x3072"), rounds)
