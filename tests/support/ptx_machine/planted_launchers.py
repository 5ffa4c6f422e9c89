"""Launchers with and without faults, for the tests of the virtual GPU. Imports Triton."""

import torch
import triton
import triton.language as tl


@triton.jit
def add_one_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < count) + 1.0, mask=at < count)


@triton.jit(do_not_specialize=("count",))
def scale_kernel(x_ptr, out_ptr, count, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < count) * factor, mask=at < count)


@triton.jit
def specialised_scale_kernel(x_ptr, out_ptr, count, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < count) * factor, mask=at < count)


@triton.jit
def take_tickets_kernel(counter_ptr, out_ptr):
    ticket = tl.atomic_add(counter_ptr, 1)
    tl.store(out_ptr + ticket, tl.program_id(0))


def _add_one(x: torch.Tensor, out: torch.Tensor, count: int) -> torch.Tensor:
    add_one_kernel[(triton.cdiv(count, 128),)](x, out, count, BLOCK=128)
    return out


def add_one(x: torch.Tensor) -> torch.Tensor:
    return _add_one(x, torch.empty_like(x), x.numel())


def add_one_to_half(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Also what a second launch makes of it; the second half is never written."""
    half = _add_one(x, torch.empty_like(x), x.numel() // 2)
    return half, _add_one(half, torch.empty_like(x), x.numel())


def add_one_to_a_filled_half(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, with the second half written by torch, by way of a view."""
    half = _add_one(x, torch.empty_like(x), x.numel() // 2)
    half[x.numel() // 2 :].copy_(x[x.numel() // 2 :])
    return half, _add_one(half, torch.empty_like(x), x.numel())


def add_one_past_the_end(x: torch.Tensor) -> torch.Tensor:
    return _add_one(x, torch.empty_like(x), x.numel() + 1)


def add_one_in_two_places(x: torch.Tensor) -> torch.Tensor:
    """Block 1 reads what block 0 writes."""
    wide = torch.zeros(x.numel() + 128)
    return _add_one(wide, wide[128:], x.numel())


def tickets(programs: int) -> torch.Tensor:
    """Which program came first, second, ...: a matter of chance."""
    out = torch.zeros(programs, dtype=torch.int32)
    take_tickets_kernel[(programs,)](torch.zeros(1, dtype=torch.int32), out)
    return out
