"""The error measure of the suite: an operator may be at most twice as far from the float64
result as the same computation in plain PyTorch at the same dtype.

One draw of the inputs that misses this may be bad luck, since both errors are random numbers. So
it decides nothing: `judge_over_draws` repeats its test with other seeds, and the errors of all
draws together, the first one's included, decide by the same factor.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fastvlp_tests import seeds

DRAWS = 5
# Far apart, so that no draw meets the seeds of a test's other cases.
STEP = 1_000_003


class TooInaccurate(AssertionError):
    """One draw's error is above the allowed one."""


class Pool:
    """Squared errors of each comparison of a test, by its name and place, over several draws."""

    def __init__(self) -> None:
        self.squares: dict[tuple[str, int], list[tuple[float, float, float]]] = defaultdict(list)
        self._seen: Counter[str] = Counter()

    def start_draw(self) -> None:
        self._seen.clear()

    def add(self, name: str, *errors: float) -> None:
        """errors: ours, eager PyTorch's, and the rounding that nothing can avoid."""
        self.squares[name, self._seen[name]].append(tuple(error**2 for error in errors))
        self._seen[name] += 1

    def judge(self) -> None:
        """Raises AssertionError where the root mean square error of all draws is too large."""
        for (name, _), draws in self.squares.items():
            ours, eager, floor = (
                math.sqrt(sum(column) / len(draws)) for column in zip(*draws, strict=True)
            )
            allowed = 2 * eager + floor
            assert ours <= allowed, (
                f"{name}: root mean square error of {len(draws)} draws {ours:.3e}, "
                f"allowed {allowed:.3e}"
            )


_pool: Pool | None = None


def assert_as_accurate(name, ours, eager, exact, floor=0.0):
    """Compares Frobenius-norm errors against `exact` (float64).

    `floor` is the rounding that even a perfect algorithm cannot avoid (of the result's dtype and
    of its largest intermediate), for the cases where eager is exact by luck.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    error = (ours.double() - exact).norm().item()
    near, floor = (eager.double() - exact).norm().item(), float(floor)
    if _pool is not None:
        _pool.add(name, error, near, floor)
    elif error > 2 * near + floor:
        raise TooInaccurate(f"{name}: error {error:.3e}, allowed {2 * near + floor:.3e}")


def judge_over_draws(test: Callable[[], object], first: TooInaccurate) -> None:
    """Repeats `test`, which raised `first`, on DRAWS draws of its inputs, and judges all together.

    The first of them is the draw that failed. Where a repetition raises anything, `first` stands.
    """
    global _pool
    _pool = pool = Pool()
    try:
        for draw in range(DRAWS):
            pool.start_draw()
            with seeds.shifted(draw * STEP):
                test()
    except Exception as error:
        raise first from error
    finally:
        _pool = None
    pool.judge()


class AddedTerms(TorchFunctionMode):
    """Sums of the absolute values of the terms that make up the gradients of linear layers' biases.

        with AddedTerms() as terms:
            loss(model).backward()
        floor = epsilon(torch.float32) * terms.of(bias).norm()

    A sum's rounding is bounded by its terms, not by itself: some gradients are zero in exact
    arithmetic, such as that of the bias of attention's keys, which moves all logits of a row alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[int, torch.Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is F.linear:
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            if bias is not None and out.requires_grad:
                out.register_hook(lambda gradient: self._add(id(bias), gradient))
        return out

    def _add(self, key: int, gradient: torch.Tensor) -> None:
        self._sums[key] = self._sums.get(key, 0) + gradient.abs().flatten(0, -2).sum(0)

    def of(self, bias: torch.Tensor) -> torch.Tensor:
        """Of each element of `bias`, which a linear layer must have used."""
        return self._sums[id(bias)]


def epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
