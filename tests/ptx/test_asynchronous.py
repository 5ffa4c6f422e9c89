"""Tensor maps, tiles and mbarriers against their definitions, element by element."""

import itertools

import numpy as np
import pytest
from ptx_machine import asynchronous
from ptx_machine.asynchronous import Barriers

BYTES = {"u8": 1, "bf16": 2, "f16": 2, "f32": 4, "tf32": 4, "f64": 8}


def swizzled_by_bits(address, mode):
    for bit in range(mode):
        if address >> (7 + bit) & 1:
            address ^= 1 << (4 + bit)
    return address


def expected_tile(case, coordinates, shared):
    """(global address or None, shared address) of each element, in nested loops."""
    element, sizes, strides, box, steps, mode = case
    width = BYTES[element]
    steps = [1, *steps[1:]]
    found = []
    # itertools.product turns its last factor fastest: the innermost dimension.
    ranges = [range(0, extent, step) for extent, step in zip(box, steps, strict=True)]
    for place in itertools.product(*ranges[::-1]):
        at = [c + p for c, p in zip(coordinates, place[::-1], strict=True)]
        inside = all(0 <= a < size for a, size in zip(at, sizes, strict=True))
        address = 0x10000 + sum(a * s for a, s in zip(at, [width, *strides], strict=True))
        offset = len(found) * width
        found.append((address if inside else None, swizzled_by_bits(shared + offset, mode)))
    return found


# element, sizes, strides, box, element strides, swizzle mode
CASES = [
    ("f32", [37], [], [16], [1], 0),
    ("bf16", [64, 9], [160], [64, 16], [1, 1], 3),
    ("f16", [100, 50], [208], [32, 8], [1, 1], 2),
    ("tf32", [9, 7], [48], [8, 20], [1, 1], 1),
    ("u8", [30, 5, 4], [32, 160], [32, 3, 2], [1, 1, 1], 0),
    ("f64", [6, 5, 4, 3], [48, 240, 960], [2, 3, 2, 2], [3, 2, 1, 2], 0),
    ("f32", [4, 3, 4, 3, 2], [16, 48, 192, 576], [4, 2, 3, 2, 2], [1, 1, 2, 1, 1], 0),
]


@pytest.mark.parametrize("case", CASES)
def test_tiles_lie_where_the_map_says(case):
    element, sizes, strides, box, steps, mode = case
    made = asynchronous.encode_tiled(0x10000, element, sizes, strides, box, steps, mode)
    assert made.nbytes == 128
    rng = np.random.default_rng(0)
    coordinates = np.stack([rng.integers(-3, size + 2, 6) for size in sizes], 1)
    shared = np.array([0, 128, 1024, 2048 + 384, 4096, 8192])
    got = asynchronous.tile(made, coordinates, shared)
    assert (got.element_bytes, got.fill) == (BYTES[element], 0)
    for b in range(6):
        expected = expected_tile(case, coordinates[b], int(shared[b]))
        assert got.shared_addresses[b].tolist() == [s for _, s in expected]
        assert got.inside[b].tolist() == [g is not None for g, _ in expected]
        addresses = got.global_addresses[b][got.inside[b]].tolist()
        assert addresses == [g for g, _ in expected if g is not None]


def test_coordinates_of_32_bits_are_signed():
    made = asynchronous.encode_tiled(0, "f32", [8, 8], [32], [4, 1])
    got = asynchronous.tile(made, np.array([[0xFFFFFFFE, 0]], np.uint32), np.array([0]))
    assert got.inside.tolist() == [[False, False, True, True]]
    assert got.global_addresses[got.inside].tolist() == [0, 4]


@pytest.mark.parametrize(
    "element, fill", [("bf16", 0x7FFF), ("f32", 0x7FFFFFFF), ("f64", 0x7FFFFFFFFFFFFFFF)]
)
def test_nan_fills_outside_where_asked(element, fill):
    sizes = [16 // BYTES[element] * 4, 8]
    made = asynchronous.encode_tiled(
        0, element, sizes, [64], [16 // BYTES[element], 1], fill_nan=True
    )
    got = asynchronous.tile(made, np.array([[0, 8]]), np.array([0]))
    assert got.fill == fill
    assert not got.inside.any()


def test_a_map_edited_by_a_kernel_is_the_one_that_host_code_makes():
    """The edits are those that Triton emits, in its order and with its numbers, for a bfloat16
    descriptor [M, K] with blocks of 128 x 64."""
    address, m, k = 0x7F00_0000_1000, 300, 200
    edits = [
        ("global_address", 0, address), ("rank", 0, 1), ("box_dim", 0, 64), ("box_dim", 1, 128),
        ("global_dim", 0, k), ("global_dim", 1, m), ("global_stride", 0, 2 * k),
        ("element_stride", 0, 1), ("element_stride", 1, 1), ("elemtype", 0, 0xA),
        ("interleave_layout", 0, 0), ("swizzle_mode", 0, 3), ("fill_mode", 0, 0),
    ]  # fmt: skip
    maps = np.zeros((3, 128), np.uint8)
    for field, ordinal, value in edits:
        asynchronous.replace(maps[:2], field, np.array([value, value], np.uint64), ordinal)
    host = asynchronous.encode_for_triton(
        address, "bf16", 2, 3, [128, 64], [m, k], [k, 1], fill_nan=False
    )
    np.testing.assert_array_equal(maps[0], host)
    np.testing.assert_array_equal(maps[1], host)
    assert not maps[2].any()
    asynchronous.replace(maps[1:2], "global_address", np.array([address + 512], np.uint64))
    assert asynchronous.tile(maps[1], [[0, 0]], [0]).global_addresses[0, 0] == address + 512
    assert asynchronous.tile(maps[0], [[0, 0]], [0]).global_addresses[0, 0] == address


def test_triton_names_dimensions_from_the_outermost():
    made = asynchronous.encode_for_triton(
        64, "f32", 4, 0, [2, 1, 8], [3, 5, 12], [240, 24, 1], fill_nan=True
    )
    same = asynchronous.encode_tiled(
        64, "f32", [12, 5, 3], [96, 960], [8, 1, 2], None, 0, fill_nan=True
    )
    np.testing.assert_array_equal(made, same)
    line = asynchronous.encode_for_triton(64, "u8", 1, 0, [32], [100], [1], fill_nan=False)
    same = asynchronous.encode_tiled(64, "u8", [100], [], [32])
    np.testing.assert_array_equal(line, same)


INVALID = [
    ("multiple of 16", dict(address=8)),
    ("strides", dict(strides=[72])),
    ("box dimensions", dict(box=[64, 257])),
    ("multiple of 16 bytes", dict(box=[12, 1])),
    ("span", dict(swizzle_mode=2)),
    ("element strides", dict(element_strides=[1, 9])),
    ("floating-point", dict(element="u16", fill_nan=True)),
]


@pytest.mark.parametrize("message, change", INVALID)
def test_invalid_maps_are_refused(message, change):
    valid = dict(address=0, element="bf16", sizes=[64, 64], strides=[128], box=[64, 8])
    asynchronous.encode_tiled(**valid, swizzle_mode=3)
    with pytest.raises(ValueError, match=message):
        asynchronous.encode_tiled(**{**valid, **change})


def test_invalid_copies_and_unknown_fields_are_refused():
    made = asynchronous.encode_tiled(0, "bf16", [64, 64], [128], [64, 8])
    with pytest.raises(ValueError, match="coordinates"):
        asynchronous.tile(made, [[0]], [0])
    with pytest.raises(ValueError, match="128 bytes"):
        asynchronous.tile(made, [[0, 0]], [64])
    maps = made[None].copy()
    with pytest.raises(NotImplementedError, match="swizzle_atomicity"):
        asynchronous.replace(maps, "swizzle_atomicity", np.array([0]))
    asynchronous.replace(maps, "interleave_layout", np.array([1]))
    with pytest.raises(NotImplementedError, match="interleaving"):
        asynchronous.tile(maps[0], [[0, 0]], [0])


def test_a_phase_ends_when_all_have_arrived():
    barriers, both = Barriers(4), np.array([1, 3])
    barriers.init(both, np.array([2, 3]))
    first = barriers.arrive(both)
    assert first.tolist() == [0, 0]
    assert barriers.passed(both, first).tolist() == [False, False]
    assert barriers.passed_parity(both, 0).tolist() == [False, False]
    assert barriers.passed_parity(both, 1).tolist() == [True, True]  # the phase before the first
    assert barriers.arrive(np.array([1])).tolist() == [0]
    assert barriers.passed(both, first).tolist() == [True, False]
    assert barriers.passed_parity(both, 0).tolist() == [True, False]
    assert barriers.passed_parity(both, 1).tolist() == [False, True]
    # Two lanes at once; then the next phase needs as many again.
    assert barriers.arrive(np.array([3, 3])).tolist() == [0, 0]
    assert barriers.passed(both, first).tolist() == [True, True]
    assert barriers.arrive(np.array([3]), 3).tolist() == [1]
    assert barriers.passed_parity(np.array([3]), 1).tolist() == [True]


def test_a_phase_waits_for_the_bytes_announced():
    barriers, one = Barriers(2), np.array([0])
    barriers.init(one, np.array([1]))
    assert barriers.arrive_expect(one, np.array([384])).tolist() == [0]
    assert not barriers.passed_parity(one, 0)
    barriers.complete(one, np.array([256]))
    assert not barriers.passed_parity(one, 0)
    barriers.complete(one, np.array([128]))
    assert barriers.passed_parity(one, 0)
    # Bytes may come before they are announced: nothing ends while an arrival is pending.
    barriers.complete(one, np.array([64]))
    assert not barriers.passed_parity(one, 1)
    barriers.arrive_expect(one, np.array([64]))
    assert barriers.passed_parity(one, 1)


def test_announcing_alone_is_no_arrival():
    barriers, one = Barriers(1), np.array([0])
    barriers.init(one, np.array([1]))
    barriers.expect(one, np.array([16]))
    barriers.complete(one, np.array([16]))
    assert not barriers.passed_parity(one, 0)
    barriers.arrive(one)
    assert barriers.passed_parity(one, 0)


def test_wrong_use_of_barriers_is_an_error():
    barriers, one = Barriers(2), np.array([1])
    with pytest.raises(ValueError, match="arrive: expected an object"):
        barriers.arrive(one)
    with pytest.raises(ValueError, match="count of 1"):
        barriers.init(one, np.array([0]))
    barriers.init(one, np.array([1]))
    with pytest.raises(ValueError, match="no more arrivals"):
        barriers.arrive(np.array([1, 1]))
    barriers.init(one, np.array([1]))
    with pytest.raises(ValueError, match="pending bytes"):
        barriers.expect(one, np.array([2**20]))
    barriers.invalidate(one)
    with pytest.raises(ValueError, match="parity: expected an object"):
        barriers.passed_parity(one, 0)
