"""Exchange between the lanes of a warp against the pseudocode of the ISA, lane by lane."""

import numpy as np
import pytest
from ptx_machine.errors import ProgramError, UnknownForm
from ptx_machine.single import execute

RNG = np.random.default_rng(0)
VALUES = RNG.integers(0, 2**32, 96, dtype=np.uint32)  # three warps
WARPS = VALUES.reshape(3, 32)
LANES = range(32)


def shuffled(mode, lane, amount, limits):
    """Where a lane reads, and whether that lies in its segment."""
    clamp, segment, amount = limits & 31, limits >> 8 & 31, amount & 31
    most = (lane & segment) | (clamp & ~segment & 31)
    least = lane & segment
    if mode == "up":
        source = lane - amount
        valid = source >= most
    elif mode == "down":
        source = lane + amount
        valid = source <= most
    elif mode == "bfly":
        source = lane ^ amount
        valid = source <= most
    else:
        source = least | (amount & ~segment & 31)
        valid = source <= most
    return (source if valid else lane), valid


# Whole warps, and segments of eight lanes.
@pytest.mark.parametrize("limits", ["whole", "eight"])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode, limits):
    segment = {"whole": 0, "eight": 0b11000}[limits] << 8
    limits = segment | (0 if mode == "up" else 31)
    for amount in (0, 1, 5, 16, 31):
        text = f"shfl.sync.{mode}.b32 d|e, a, {amount}, {limits}, -1"
        got, valid = execute(text, ("b32", "pred"), a=VALUES)
        for w in range(3):
            for lane in LANES:
                source, inside = shuffled(mode, lane, amount, limits)
                assert got[32 * w + lane] == WARPS[w, source], (amount, lane)
                assert valid[32 * w + lane] == inside


def test_shuffles_by_amounts_of_their_own():
    amounts = RNG.integers(0, 64, 96, dtype=np.uint32)
    got = execute("shfl.sync.idx.b32 d, a, b, 31, 0xffffffff", "b32", a=VALUES, b=amounts)
    wanted = [WARPS[i // 32, amounts[i] & 31] for i in range(96)]
    np.testing.assert_array_equal(got, wanted)


def test_votes():
    held = np.zeros((3, 32), bool)
    held[1], held[2, 5] = True, True
    p = held.reshape(-1)
    for mode, wanted in (
        ("all", held.all(1)), ("any", held.any(1)), ("uni", [True, True, False]),
    ):  # fmt: skip
        got = execute(f"vote.sync.{mode}.pred d, a, -1", "pred", a=p)
        np.testing.assert_array_equal(got, np.repeat(wanted, 32))
    got = execute("vote.sync.ballot.b32 d, a, -1", "b32", a=p)
    np.testing.assert_array_equal(got, np.repeat(np.uint32([0, 2**32 - 1, 1 << 5]), 32))


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_reductions_of_numbers(kind):
    dtype = np.uint32 if kind == "u32" else np.int32
    numbers = WARPS.view(dtype)
    for name, wanted in (
        ("min", numbers.min(1)), ("max", numbers.max(1)), ("add", numbers.sum(1, dtype=dtype)),
    ):  # fmt: skip
        got = execute(f"redux.sync.{name}.{kind} d, a, -1", "b32", a=VALUES)
        np.testing.assert_array_equal(got.view(dtype), np.repeat(wanted, 32))


def test_reductions_of_bits():
    for name, function in (
        ("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor),
    ):  # fmt: skip
        got = execute(f"redux.sync.{name}.b32 d, a, -1", "b32", a=VALUES)
        np.testing.assert_array_equal(got, np.repeat(function.reduce(WARPS, axis=1), 32))


@pytest.mark.parametrize("bits", [32, 64])
def test_matches(bits):
    held = RNG.integers(0, 4, (3, 32)).astype(f"u{bits // 8}") << bits - 4
    held[1] = 9
    masks = [[sum(int(row[j] == row[i]) << j for j in LANES) for i in LANES] for row in held]
    got = execute(f"match.any.sync.b{bits} d, a, -1", "b32", a=held.reshape(-1))
    np.testing.assert_array_equal(got, np.uint32(masks).reshape(-1))
    got, everyone = execute(
        f"match.all.sync.b{bits} d|e, a, -1", ("b32", "pred"), a=held.reshape(-1)
    )
    wanted = np.repeat(np.uint32([0, 2**32 - 1, 0]), 32)
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(everyone, wanted != 0)


def test_one_lane_is_elected():
    lane, elected = execute("elect.sync d|e, -1", ("b32", "pred"), a=VALUES)
    assert not lane.any()
    np.testing.assert_array_equal(np.flatnonzero(elected), [0, 32, 64])


def test_active_lanes():
    p = VALUES % 3 == 0
    got = execute("mov.u32 d, 0; @p activemask.b32 d", "b32", p=p)
    masks = [sum(1 << j for j in LANES if row[j]) for row in p.reshape(3, 32)]
    np.testing.assert_array_equal(got[p], np.repeat(np.uint32(masks), 32)[p])
    assert not got[~p].any()


def test_a_part_of_a_warp_is_an_error():
    with pytest.raises(UnknownForm, match="part of the warp"):
        execute("shfl.sync.bfly.b32 d, a, 1, 31, 0xffff", "b32", a=VALUES)
    with pytest.raises(ProgramError, match="part of the warp"):
        execute("shfl.sync.bfly.b32 d, a, 1, 31, b", "b32", a=VALUES, b=VALUES | np.uint32(1))
    with pytest.raises(ProgramError):
        p = VALUES % 2 == 0
        execute("@p shfl.sync.bfly.b32 d, a, 1, 31, -1", "b32", a=VALUES, p=p)
