"""The model compared with published measurements of kernels of the same form and tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from _gpu import published
from _gpu import sanity_kernels as kernels
from _gpu.bound import Bound, Executed, bounds
from _gpu.chips import A100_40GB, H100, Chip
from _gpu.launches import KernelLaunch, record
from _gpu.occupancy import occupancy


@dataclass(frozen=True)
class Comparison:
    """A kernel on a chip: times by case, in ms, published and the model's."""

    kernel: str
    chip: str
    cases: tuple[str, ...]
    published: tuple[float, ...]
    model: tuple[float, ...]
    # The same as rates, in `unit`, which sizes change less than times.
    unit: str
    work: tuple[float, ...]
    limits: tuple[str, ...]

    def rates(self, times: Sequence[float]) -> list[float]:
        return [work / ms for work, ms in zip(self.work, times, strict=True)]

    @property
    def rank_of_times(self) -> float:
        return rank_correlation(self.published, self.model)

    @property
    def rank_of_rates(self) -> float:
        return rank_correlation(self.rates(self.published), self.rates(self.model))

    @property
    def ratio(self) -> float:
        """Geometric mean of published over modelled times."""
        ratios = [math.log(p / m) for p, m in zip(self.published, self.model, strict=True)]
        return math.exp(sum(ratios) / len(ratios))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of at least two values; equal values share their mean rank."""
    ranks = [_ranks(values) for values in (a, b)]
    centred = [[r - (len(rs) - 1) / 2 for r in rs] for rs in ranks]
    products = sum(x * y for x, y in zip(*centred, strict=True))
    return products / math.sqrt(math.prod(sum(x * x for x in c) for c in centred))


def _ranks(values: Sequence[float]) -> list[float]:
    below = [sum(other < value for other in values) for value in values]
    return [b + (values.count(v) - 1) / 2 for b, v in zip(below, values, strict=True)]


def _fp16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).half()


def _empty(*shape: int, dtype=torch.float16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def _fastest(found: Sequence[Bound]) -> Bound:
    """What an autotuner would find, were the model right."""
    return min(found, key=lambda bound: bound.ms)


def _executed(chip: Chip, sizes: tuple[int, int], run: Callable[[int], Callable]) -> Executed:
    return Executed(sizes, tuple(record(run(n), chip.executes, execute=True) for n in sizes))


def matmul(
    chip: Chip, table: dict[int, float], sizes: Sequence[int], tiles=kernels.MATMUL_TILES
) -> Comparison:
    """Executed at two depths of a matmul of 256 x 256, scaled to [N, N] by [N, N]."""
    depths = (128, 256)
    executed = {
        tile: _executed(
            chip, depths, lambda k, t=tile: partial(kernels.matmul, _fp16(256, k), _fp16(k, 256), t)
        )
        for tile in tiles
    }
    found = []
    for n in sizes:
        a = _empty(n, n)
        each = []
        for tile, known in executed.items():
            true = record(partial(kernels.matmul, a, a, tile), chip.executes, execute=False)
            each += bounds(chip, known, true, n)
        found.append(_fastest(each))
    work = [2 * n**3 / 1e9 for n in sizes]
    return _comparison("matmul fp16", chip, sizes, table, found, work, "TFLOP/s")


def softmax(chip: Chip, table: dict[int, float], sizes: Sequence[int], rows=4096) -> Comparison:
    """Executed with two and four rows for each of two programs, scaled to as many as fit."""
    found = []
    for n in sizes:
        executed = _executed(
            chip, (2, 4), lambda each, n=n: partial(kernels.softmax, torch.randn(2 * each, n), 2)
        )
        x = _empty(rows, n, dtype=torch.float32)
        true = record(partial(kernels.softmax, x, rows), chip.executes, execute=False)
        (launch,) = (event for event in true if isinstance(event, KernelLaunch))
        binary = launch.binary
        held = occupancy(chip, binary.warps, binary.registers, binary.shared_bytes).blocks
        launch.blocks = min(rows, held * chip.sms)
        found += bounds(chip, executed, [launch], rows / launch.blocks)
    work = [8 * rows * n / 1e6 for n in sizes]
    return _comparison("softmax fp32", chip, sizes, table, found, work, "GB/s")


def attention(
    chip: Chip,
    table: dict[tuple[bool, int], float],
    sizes: Sequence[tuple[bool, int]],
    tiles=kernels.ATTENTION_TILES,
) -> Comparison:
    """Executed for one head of two lengths, scaled to 4 x 32 heads of 64."""
    found, executed = [], {}
    for causal, length in sizes:
        q = _empty(128, length, 64)
        each = []
        for tile in tiles:
            key = causal, tile
            if key not in executed:
                executed[key] = _executed(
                    chip, (256, 512),
                    lambda n, c=causal, t=tile: partial(
                        kernels.attention, *(_fp16(1, n, 64) for _ in range(3)), c, t
                    ),
                )  # fmt: skip
            run = partial(kernels.attention, q, q, q, causal, tile)
            true = record(run, chip.executes, execute=False)
            each += bounds(chip, executed[key], true, length)
        found.append(_fastest(each))
    work = [4 * 128 * length**2 * 64 / (2 if causal else 1) / 1e9 for causal, length in sizes]
    return _comparison("attention fp16", chip, sizes, table, found, work, "TFLOP/s")


def _comparison(kernel, chip, sizes, table, found, work, unit) -> Comparison:
    return Comparison(
        kernel, chip.name, tuple(map(_label, sizes)),
        tuple(w / table[size] for w, size in zip(work, sizes, strict=True)),
        tuple(bound.ms for bound in found), unit, tuple(work),
        tuple(bound.limited_by for bound in found),
    )  # fmt: skip


def _label(size) -> str:
    if isinstance(size, tuple):
        causal, length = size
        return f"{'causal' if causal else 'full'} {length}"
    return str(size)


def comparisons(quick: bool) -> list[Comparison]:
    """All of them, or one size in two on one chip."""
    tables = [
        (matmul, A100_40GB, published.MATMUL_A100),
        (softmax, A100_40GB, published.SOFTMAX_A100),
        (attention, A100_40GB, published.ATTENTION_A100),
        (matmul, H100, published.MATMUL_HOPPER),
        (softmax, H100, published.SOFTMAX_HOPPER),
    ]
    if quick:
        return [
            compare(chip, table, [*table][:: max(1, len(table) // 3)])
            for compare, chip, table in tables[:3]
        ]
    return [compare(chip, table, [*table]) for compare, chip, table in tables]


def describe(found: Comparison) -> str:
    """The comparison as lines of text, calling the model a model."""
    lines = [
        f"{found.kernel} on {found.chip}: {found.unit} published, of the model (limit)",
        *(
            f"  {case:>13} {a:9.1f} {b:9.1f}  ({limit})"
            for case, a, b, limit in zip(
                found.cases, found.rates(found.published), found.rates(found.model), found.limits,
                strict=True,
            )
        ),
        f"  rank correlation of times {found.rank_of_times:.3f}, of rates "
        f"{found.rank_of_rates:.3f}; published times are {found.ratio:.2f} times the model's",
    ]  # fmt: skip
    return "\n".join(lines)
