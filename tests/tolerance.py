"""The error measure of the suite: an operator may be at most twice as far from the float64
result as the same computation in plain PyTorch at the same dtype."""

import torch


def assert_as_accurate(name, ours, eager, exact, floor=0.0):
    """Compares Frobenius-norm errors against `exact` (float64).

    `floor` is the rounding that even a perfect algorithm cannot avoid (of the result's dtype and
    of its largest intermediate), for the cases where eager is exact by luck.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    error = (ours.double() - exact).norm().item()
    allowed = 2 * (eager.double() - exact).norm().item() + floor
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
