"""Matrix instructions against the fragment layouts of the PTX ISA, element by element.

The references spell out the ISA's case distinctions in scalar loops and add exactly.
"""

import math

import numpy as np
import pytest
from ptx_machine import matrix

RNG = np.random.default_rng(0)
LANES = range(32)
MMA_SHAPES = [
    ("m16n8k16", ("f32", "bf16", "bf16", "f32")),
    ("m16n8k16", ("f32", "f16", "f16", "f32")),
    ("m16n8k16", ("f16", "f16", "f16", "f16")),
    ("m16n8k8", ("f32", "bf16", "bf16", "f32")),
    ("m16n8k8", ("f16", "f16", "f16", "f16")),
    ("m16n8k8", ("f32", "tf32", "tf32", "f32")),
    ("m16n8k4", ("f32", "tf32", "tf32", "f32")),
    ("m16n8k32", ("s32", "s8", "s8", "s32")),
    ("m16n8k16", ("s32", "u8", "s8", "s32")),
]


def depth_of(shape):
    return int(shape.split("k")[1])


def row_of_a(kind, depth, group, i):
    """The row of element a_i, from the ISA's tables of mma.m16n8kK."""
    if kind in ("f16", "bf16"):
        low = i in (0, 1) if depth == 8 else i in (0, 1, 4, 5)
    elif kind == "tf32":
        low = i in (0, 2)
    else:
        low = i < 4 if depth == 16 else i < 4 or 8 <= i < 12
    return group if low else group + 8


def column_of_a(kind, depth, place, i):
    if kind in ("f16", "bf16"):
        return place * 2 + (i & 1) + (8 if i >= 4 else 0)
    if kind == "tf32":
        return place + (4 if i >= 2 else 0)
    return place * 4 + (i & 3) + (16 if i >= 8 else 0)


def row_of_b(kind, place, i):
    if kind in ("f16", "bf16"):
        return place * 2 + (i & 1) + (8 if i >= 2 else 0)
    if kind == "tf32":
        return place + 4 * i
    return place * 4 + (i & 3) + (16 if i >= 4 else 0)


def bits_of(value, kind):
    """The bits of a value that the element type represents."""
    if kind == "f16":
        return int(np.float16(value).view(np.uint16))
    if kind in ("f32", "tf32", "bf16"):
        bits = int(np.float32(value).view(np.uint32))
        return bits >> 16 if kind == "bf16" else bits
    return int(value) & (0xFF if kind in ("s8", "u8") else 0xFFFFFFFF)


def value_of(bits, kind):
    if kind == "f16":
        return float(np.uint16(bits).view(np.float16))
    if kind in ("f32", "bf16"):
        return float(np.uint32(bits << 16 if kind == "bf16" else bits).view(np.float32))
    return bits - (1 << 32) if bits >> 31 else bits


def draw(kind, *shape):
    """Values that the element type represents, as float64."""
    if kind in ("s8", "s32"):
        return RNG.integers(-128, 128, shape).astype(np.float64)
    if kind == "u8":
        return RNG.integers(0, 256, shape).astype(np.float64)
    values = RNG.standard_normal(shape).astype(np.float32)
    if kind == "f16":
        return values.astype(np.float16).astype(np.float64)
    keep = {"f32": 0xFFFFFFFF, "tf32": 0xFFFFE000, "bf16": 0xFFFF0000}[kind]
    return (values.view(np.uint32) & np.uint32(keep)).view(np.float32).astype(np.float64)


def pack(elements, kind):
    """Elements in the order of the ISA's vector, as registers."""
    width = {"f16": 16, "bf16": 16, "s8": 8, "u8": 8}.get(kind, 32)
    per = 32 // width
    return [
        sum(bits_of(v, kind) << (width * j) for j, v in enumerate(elements[at : at + per]))
        for at in range(0, len(elements), per)
    ]


def unpack(registers, kind):
    if kind == "f16":
        return [value_of(int(r) >> shift & 0xFFFF, kind) for r in registers for shift in (0, 16)]
    return [value_of(int(r), kind) for r in registers]


def exact_dot(row, column, before):
    """Products of at most 22 bits are exact in float64, and so is their sum but for one rounding
    to nearest, 29 bits further than float32 has."""
    return math.fsum([*(row * column), before])


def accumulated(exact, kind):
    """An exact sum as the accumulator holds it: float32 cut off, float16 to nearest."""
    if kind == "s32":
        return int(exact)
    if kind == "f16":
        return float(np.float16(exact))
    near = np.float32(exact)
    if abs(float(near)) > abs(exact):
        near = np.nextafter(near, np.float32(0))
    return float(near)


def fragments_of_a(a, kind):
    """Registers [32, n] of a tile of 16 rows."""
    depth = a.shape[1]
    return [
        pack(
            [
                a[row_of_a(kind, depth, lane >> 2, i), column_of_a(kind, depth, lane % 4, i)]
                for i in range(16 * depth // 32)
            ],
            kind,
        )
        for lane in LANES
    ]


@pytest.mark.parametrize("shape, kinds", MMA_SHAPES)
def test_mma_sync_multiplies_the_documented_fragments(shape, kinds):
    depth, (out, kind_a, kind_b, kind_c) = depth_of(shape), kinds
    a, b = draw(kind_a, 2, 16, depth), draw(kind_b, 2, depth, 8)
    c = draw(kind_c, 2, 16, 8)
    left = np.array([fragments_of_a(tile, kind_a) for tile in a], np.uint32)
    right = np.array(
        [
            [
                pack([tile[row_of_b(kind_b, lane % 4, i), lane >> 2] for i in range(depth // 4)],
                     kind_b)
                for lane in LANES
            ]
            for tile in b
        ],
        np.uint32,
    )  # fmt: skip
    places = [
        [((lane >> 2) + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)) for i in range(4)]
        for lane in LANES
    ]
    before = np.array(
        [[pack([tile[at] for at in lane], kind_c) for lane in places] for tile in c], np.uint32
    )
    got = matrix.mma_sync(shape, kinds, left, right, before)
    assert got.dtype == np.uint32 and got.shape == before.shape
    for w in range(2):
        for lane, spots in enumerate(places):
            for value, (i, j) in zip(unpack(got[w, lane], out), spots, strict=True):
                exact = exact_dot(a[w, i], b[w, :, j], c[w, i, j])
                assert value == accumulated(exact, out), (w, lane, i, j)


def test_float32_accumulators_are_cut_off_and_not_rounded():
    a = np.zeros((1, 32, 4), np.uint32)
    b = np.zeros((1, 32, 2), np.uint32)
    c = np.zeros((1, 32, 4), np.uint32)
    a[0, 0, 0] = bits_of(1.0, "bf16") | bits_of(0.75, "bf16") << 16  # columns 0 and 1 of row 0
    b[0, 0, 0] = bits_of(-1.0, "bf16") | bits_of(-(2.0**-23), "bf16") << 16  # of column 0
    kinds = ("f32", "bf16", "bf16", "f32")
    down = matrix.mma_sync("m16n8k16", kinds, a, b, c)
    # -1 - 0.75 ulp: to nearest would be one ulp further from zero.
    assert down[0, 0, 0] == bits_of(-1.0, "f32")
    assert not down[0, 1:].any()


def test_special_values_of_float32_accumulators():
    kinds = ("f32", "f16", "f16", "f32")
    a = np.zeros((1, 32, 4), np.uint32)
    b = np.zeros((1, 32, 2), np.uint32)
    c = np.zeros((1, 32, 4), np.uint32)
    b[0, 0, 0] = bits_of(1.0, "f16")
    for value, bits in ((np.inf, 0x7F800000), (-np.inf, 0xFF800000), (np.nan, 0x7FFFFFFF)):
        a[0, 0, 0] = bits_of(value, "f16")
        assert matrix.mma_sync("m16n8k16", kinds, a, b, c)[0, 0, 0] == bits
    a[0, 0, 0] = bits_of(1.0, "f16")
    c[0, 0, 0] = 0xFFC12345  # any NaN
    assert matrix.mma_sync("m16n8k16", kinds, a, b, c)[0, 0, 0] == 0x7FFFFFFF


def test_tf32_inputs_lose_their_low_bits():
    kinds = ("f32", "tf32", "tf32", "f32")
    a = np.full((1, 32, 4), bits_of(1.0, "f32") | 0x1FFF, np.uint32)
    b = np.full((1, 32, 2), bits_of(1.0, "f32"), np.uint32)
    got = matrix.mma_sync("m16n8k8", kinds, a, b, np.zeros((1, 32, 4), np.uint32))
    assert (got == bits_of(8.0, "f32")).all()


@pytest.mark.parametrize("saturate, expected", [(False, 0x80000007), (True, 0x7FFFFFFF)])
def test_integer_accumulators_wrap_unless_they_saturate(saturate, expected):
    kinds = ("s32", "s8", "s8", "s32")
    a = np.zeros((1, 32, 4), np.uint32)
    b = np.zeros((1, 32, 2), np.uint32)
    a[0, 0, 0], b[0, 0, 0] = 2, 4
    c = np.full((1, 32, 4), 0x7FFFFFFF, np.uint32)
    got = matrix.mma_sync("m16n8k32", kinds, a, b, c, saturate)
    assert got[0, 0, 0] == expected
    assert (got[0, 1:] == 0x7FFFFFFF).all()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(count, transposed):
    rows = RNG.integers(0, 2**16, (3, 8 * count, 8)).astype(np.uint16)
    registers = matrix.ldmatrix(rows, count, transposed)
    assert registers.shape == (3, 32, count) and registers.dtype == np.uint32
    for w in range(3):
        for lane in LANES:
            for q in range(count):
                # Lane l holds elements 2 (l % 4) and the next one of row l / 4, of the transpose
                # where asked for.
                tile = rows[w, 8 * q : 8 * q + 8]
                line, first = lane // 4, lane % 4 * 2
                low, high = (
                    int(tile[first + h, line] if transposed else tile[line, first + h])
                    for h in (0, 1)
                )
                assert registers[w, lane, q] == low | high << 16
    stored = matrix.stmatrix(registers, transposed)
    assert stored.dtype == np.uint16
    np.testing.assert_array_equal(stored, rows)


def wgmma_accumulator_place(lane, i):
    """Row and column of d_i of m64nN, by the ISA: warp, group, pairs of eight columns."""
    row = 16 * (lane // 32) + lane % 32 // 4 + (8 if i % 4 >= 2 else 0)
    return row, 8 * (i // 4) + 2 * (lane % 4) + (i & 1)


WGMMA_KINDS = [
    (("f32", "bf16", "bf16"), 16),
    (("f32", "f16", "f16"), 16),
    (("f16", "f16", "f16"), 16),
    (("f32", "tf32", "tf32"), 8),
    (("s32", "u8", "s8"), 32),
]


@pytest.mark.parametrize("kinds, depth", WGMMA_KINDS)
@pytest.mark.parametrize("from_registers", [False, True])
@pytest.mark.parametrize("columns", [8, 24])
def test_wgmma_multiplies_the_documented_fragments(kinds, depth, from_registers, columns):
    out, kind, kind_b = kinds
    a, b = draw(kind, 1, 64, depth), draw(kind_b, 1, columns, depth)
    before = draw(out, 1, 64, columns)
    width = f"u{32 // depth}"
    if from_registers:
        warps = [fragments_of_a(a[0, 16 * w : 16 * w + 16], kind) for w in range(4)]
        left = np.array([sum(warps, [])], np.uint32)
    else:
        left = np.vectorize(lambda v: bits_of(v, kind))(a).astype(width)
    right = np.vectorize(lambda v: bits_of(v, kind_b))(b).astype(width)
    places = [
        [wgmma_accumulator_place(lane, i) for i in range(columns // 2)] for lane in range(128)
    ]
    held = np.array([[pack([before[0][at] for at in spots], out) for spots in places]], np.uint32)
    got = matrix.wgmma(f"m64n{columns}k{depth}", kinds, left, right, held)
    for lane, spots in enumerate(places):
        for value, (i, j) in zip(unpack(got[0, lane], out), spots, strict=True):
            exact = exact_dot(a[0, i], b[0, j], before[0, i, j])
            assert value == accumulated(exact, out), (lane, i, j)


def test_wgmma_scales_and_negates():
    kinds, shape = ("f32", "bf16", "bf16"), "m64n8k16"
    one = np.uint16(bits_of(1.0, "bf16"))
    a, b = np.full((2, 64, 16), one), np.full((2, 8, 16), one)
    held = np.full((2, 128, 4), bits_of(3.0, "f32"), np.uint32)

    def values(*arguments):
        got = matrix.wgmma(shape, kinds, a, b, held, *arguments).view(np.float32)
        return [got[g].min() if (got[g] == got[g].min()).all() else None for g in range(2)]

    assert values() == [19.0, 19.0]
    assert values(np.array([True, False])) == [19.0, 16.0]
    assert values(True, True) == [-13.0, -13.0]
    assert values(True, False, True) == [-13.0, -13.0]
    assert values(False, True, True) == [16.0, 16.0]


def test_a_discarded_accumulator_may_hold_anything():
    a = np.zeros((1, 64, 16), np.uint16)
    b = np.zeros((1, 8, 16), np.uint16)
    nan = np.full((1, 128, 4), 0x7FFFFFFF, np.uint32)
    assert not matrix.wgmma("m64n8k16", ("f32", "f16", "f16"), a, b, nan, False).any()


def descriptor(start, leading, stride, mode):
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | mode << 62


def swizzled_by_bits(address, mode):
    """Bits 4.. of the address flipped by bits 7.., one bit for 32 bytes up to three for 128."""
    for bit in range({0: 0, 1: 3, 2: 2, 3: 1}[mode]):
        if address >> (7 + bit) & 1:
            address ^= 1 << (4 + bit)
    return address


def canonical_address(fields, row, column, element_bytes, transposed):
    """From the ISA's canonical layouts, whose unit is 16 bytes: ((8, n), 2): ((w, SBO), 1) with w
    units of a swizzled span for K-major operands, ((w, n), (8, k)): ((1, LBO), (w, SBO)) for
    MN-major ones, and without swizzling ((8, n), 2): ((1, SBO), LBO) and
    ((1, n), (8, k)): ((-, SBO), (1, LBO))."""
    start, leading, stride, mode = fields
    width = {0: 1, 1: 8, 2: 4, 3: 2}[mode]
    per_unit = 16 // element_bytes
    if transposed:
        unit, rest = divmod(row, per_unit)
        if mode == 0:
            offset = unit * stride + column % 8 * 16 + column // 8 * leading
        else:
            offset = unit % width * 16 + unit // width * leading
            offset += column % 8 * width * 16 + column // 8 * stride
    else:
        unit, rest = divmod(column, per_unit)
        offset = row % 8 * width * 16 + row // 8 * stride
        offset += unit * (leading if mode == 0 else 16)
    return swizzled_by_bits(start + offset + rest * element_bytes, mode)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("element_bytes, transposed", [(2, False), (2, True), (4, False)])
def test_descriptors_lead_to_the_canonical_layouts(mode, element_bytes, transposed):
    rows, columns = 72, 32 // element_bytes
    fields = [(0x2000, 0x1000, 0x400, mode), (0x2420, 0x200, 0x800, mode)]
    given = np.array([descriptor(*f) for f in fields], np.uint64)
    got = matrix.wgmma_descriptor_addresses(given, rows, columns, element_bytes, transposed)
    assert got.shape == (2, rows, columns)
    for g, f in enumerate(fields):
        for row in range(rows):
            for column in range(columns):
                expected = canonical_address(f, row, column, element_bytes, transposed)
                assert got[g, row, column] == expected, (g, row, column)


def test_a_swizzled_tile_has_each_element_once():
    given = np.array([descriptor(0x1000, 0, 1024, 1)], np.uint64)
    tile = [matrix.wgmma_descriptor_addresses(given + 2 * np.uint64(k), 64, 16, 2, False)
            for k in range(4)]  # fmt: skip
    assert sorted(np.concatenate(tile, axis=None)) == list(range(0x1000, 0x1000 + 64 * 128, 2))


def test_unknown_forms_are_errors():
    zero = np.zeros((1, 32, 4), np.uint32)
    with pytest.raises(NotImplementedError, match="m8n8k4"):
        matrix.mma_sync("m8n8k4", ("f32", "tf32", "tf32", "f32"), zero, zero, zero)
    with pytest.raises(NotImplementedError, match="e4m3"):
        matrix.mma_sync("m16n8k32", ("f32", "e4m3", "e4m3", "f32"), zero, zero, zero)
    with pytest.raises(NotImplementedError, match="depth"):
        matrix.mma_sync("m16n8k32", ("f32", "bf16", "bf16", "f32"), zero, zero, zero)
    with pytest.raises(ValueError, match="a: expected shape"):
        matrix.mma_sync("m16n8k16", ("f32", "bf16", "bf16", "f32"), zero[..., :2], zero, zero)
    offset = np.array([1 << 49], np.uint64)
    with pytest.raises(NotImplementedError, match="base offset"):
        matrix.wgmma_descriptor_addresses(offset, 8, 16, 2, False)
    with pytest.raises(ValueError, match="16-bit"):
        matrix.wgmma_descriptor_addresses(offset * 0, 8, 8, 4, True)
    with pytest.raises(ValueError, match="m64n8"):
        matrix.wgmma("m64n12k16", ("f32", "f16", "f16"), zero, zero, zero)
