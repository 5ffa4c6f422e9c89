"""ld, st, atom, red, cp.async and addresses against their definitions."""

import numpy as np
import pytest
from ptx_machine import matrix
from ptx_machine.errors import ProgramError, UnknownForm
from ptx_machine.memory import SHARED_BASE, WINDOWS
from ptx_machine.schedule import Schedule
from ptx_machine.single import execute

RNG = np.random.default_rng(0)
LATE = Schedule(late=True)
EARLY = Schedule()
SLOTS = ".shared .align 128 .b8 slots[4096]"


def buffer(count, dtype=np.uint8):
    """Random bits."""
    return RNG.integers(0, 256, count * np.dtype(dtype).itemsize, dtype=np.uint8).view(dtype)


def addresses(array, step=1):
    """Of every step-th element."""
    return np.arange(0, len(array), step, dtype=np.uint64) * array.itemsize + array.ctypes.data


@pytest.mark.parametrize("kind", ["b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32"])
@pytest.mark.parametrize("register", ["b16", "b32", "b64"])
def test_loads_extend_to_the_register(kind, register):
    bits, wide = int(kind[1:]), int(register[1:])
    if bits > wide:
        with pytest.raises(UnknownForm):
            execute(f"ld.global.{kind} d, [a]", register, a=np.zeros(1, np.uint64))
        return
    data = buffer(50, f"u{bits // 8}")
    got = execute(f"ld.global.{kind} d, [a]", register, a=addresses(data), buffers=[data])
    signed = data.view(f"i{bits // 8}").astype(f"i{wide // 8}").view(f"u{wide // 8}")
    np.testing.assert_array_equal(got, signed if kind[0] == "s" else data)


def test_loads_and_stores_of_floats_copy_bits():
    for kind, dtype in (("f32", np.float32), ("f64", np.float64)):
        data, out = buffer(40, dtype), np.zeros(40, dtype)
        a, b = addresses(data), addresses(out)
        execute(f".reg .{kind} x; ld.global.{kind} x, [a]; st.global.{kind} [b], x", (),
                a=a, b=b, buffers=[data, out])  # fmt: skip
        assert data.tobytes() == out.tobytes()


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("kind", ["b8", "b16", "b32", "b64"])
@pytest.mark.parametrize("count", [2, 4])
def test_vectors(space, kind, count):
    """The elements lie in memory in the order of the operand."""
    size = int(kind[1:]) // 8
    register = kind if size > 1 else "b16"
    if size * count > 16:
        return
    data = buffer(32 * count, f"u{size}")
    out = np.zeros_like(data)
    names = ", ".join("defg"[:count])
    copy = ""
    target = "[b]"
    if space == "shared":
        copy = f"; st.shared.v{count}.{kind} [c], {{{names}}}; ld.shared.v{count}.{kind} " + (
            f"{{{names}}}, [c]"
        )
    offsets = np.arange(32, dtype=np.uint32) * (size * count) + SHARED_BASE
    got = execute(
        f"{SLOTS}; .reg .b32 x; mov.b32 x, slots; ld.global.v{count}.{kind} {{{names}}}, [a]"
        f"{copy}; st.global.v{count}.{kind} {target}, {{{names}}}",
        (register,) * count,
        a=addresses(data, count), b=addresses(out, count), c=offsets, buffers=[data, out],
    )  # fmt: skip
    np.testing.assert_array_equal(out, data)
    np.testing.assert_array_equal(np.stack(got, 1), data.reshape(-1, count))


def test_offsets_and_modifiers_of_accesses():
    data = np.arange(40, dtype=np.uint32)
    a = addresses(data)[4:36]
    for text, shift in (
        ("ld.global.u32 d, [a+8]", 2), ("ld.global.u32 d, [a+-16]", -4),
        ("ld.global.nc.u32 d, [a]", 0), ("ld.volatile.global.u32 d, [a]", 0),
        ("ld.global.L1::evict_last.L2::128B.b32 d, [a+4]", 1),
        ("ld.relaxed.gpu.global.u32 d, [a]", 0), ("ld.global.ca.u32 d, [a]", 0),
        ("ld.global.nc.L1::no_allocate.b32 {d}, [a + 0]", 0),
    ):  # fmt: skip
        got = execute(text, "b32", a=a, buffers=[data])
        np.testing.assert_array_equal(got, data[4 + shift : 36 + shift], err_msg=text)


def test_stores_write_the_low_bits():
    for kind in ("b8", "u8", "s8", "b16"):
        out = np.zeros(32, f"u{int(kind[1:]) // 8}")
        values = buffer(32, np.uint32)
        execute(f"st.global.{kind} [a], b", (), a=addresses(out), b=values, buffers=[out])
        np.testing.assert_array_equal(out, values.astype(out.dtype))
    out = np.full(32, 7, np.uint32)
    p = RNG.random(32) < 0.5
    execute("@p st.global.u32 [a], 9", (), a=addresses(out), p=p, buffers=[out])
    np.testing.assert_array_equal(out, np.where(p, 9, 7))


def test_generic_addresses_tell_spaces_apart():
    """Odd lanes read global memory, even ones what they stored to shared memory."""
    data = np.arange(100, 132, dtype=np.uint32)
    a = addresses(data)
    text = (
        f"{SLOTS}; .reg .b64 s, x; .reg .b32 i, n; mov.u32 i, %tid.x; mov.b32 n, slots;"
        "mad.lo.u32 n, i, 4, n; st.shared.u32 [n], i; mov.u64 s, slots; cvta.shared.u64 s, s;"
        "mad.wide.u32 s, i, 4, s; selp.b64 x, a, s, p; ld.u32 d, [x]; mov.b64 e, s"
    )
    odd = np.arange(32) % 2 == 1
    got, shared = execute(text, ("b32", "b64"), a=a, p=odd, buffers=[data])
    np.testing.assert_array_equal(got, np.where(odd, data, np.arange(32)))
    assert (shared >= WINDOWS["shared"]).all()
    back = execute("cvta.to.shared.u64 d, a", "b64", a=shared)
    np.testing.assert_array_equal(back, SHARED_BASE + 4 * np.arange(32))
    np.testing.assert_array_equal(execute("cvta.to.global.u64 d, a", "b64", a=a), a)


ATOMIC = {
    "add": lambda old, b: old + b, "min": min, "max": max, "and": lambda old, b: old & b,
    "or": lambda old, b: old | b, "xor": lambda old, b: old ^ b, "exch": lambda old, b: b,
    "inc": lambda old, b: 0 if old >= b else old + 1,
    "dec": lambda old, b: b if old == 0 or old > b else old - 1,
}  # fmt: skip
ATOMIC_FORMS = (
    [("add", k) for k in ("u32", "s32", "u64")]
    + [(n, k) for n in ("min", "max") for k in ("u32", "s32", "u64", "s64")]
    + [(n, k) for n in ("and", "or", "xor", "exch") for k in ("b32", "b64")]
    + [("inc", "u32"), ("dec", "u32")]
)


@pytest.mark.parametrize("name, kind", ATOMIC_FORMS)
def test_atomic_operations_take_turns(name, kind):
    """64 lanes on five words, one after another; each sees what the ones before it left."""
    bits = int(kind[1:])
    dtype = f"{'i' if kind[0] == 's' else 'u'}{bits // 8}"
    words, values = buffer(5, dtype), buffer(64, dtype)
    if name in ("inc", "dec"):
        words, values = words % 4, values % 6
    which = RNG.integers(0, 5, 64)
    at, expected, seen = addresses(words)[which], [int(w) for w in words], []
    for word, value in zip(which, values, strict=True):
        seen.append(expected[word])
        result = ATOMIC[name](expected[word], int(value)) % (1 << bits)
        signed = kind[0] == "s" and result >> bits - 1
        expected[word] = result - (1 << bits) if signed else result
    unchanged = words.copy()
    got = execute(f"atom.global.{name}.{kind} d, [a], b", f"b{bits}", a=at, b=values,
                  buffers=[words])  # fmt: skip
    assert got.view(dtype).tolist() == seen
    assert words.tolist() == expected
    if name != "exch":
        at = addresses(unchanged)[which]
        execute(f"red.relaxed.gpu.global.{name}.{kind} [a], b", (), a=at, b=values,
                buffers=[unchanged])  # fmt: skip
        assert unchanged.tolist() == expected


def test_atomic_sums_of_floats_round_at_every_step():
    for kind, dtype, prefix in (
        ("f32", np.float32, "atom.gpu.global"), ("f32", np.float32, "atom.global.gpu.relaxed"),
        ("f64", np.float64, "atom.global"),
    ):  # fmt: skip
        word, values = np.ones(1, dtype), RNG.standard_normal(32).astype(dtype)
        at = np.resize(addresses(word), 32)
        expected = dtype(1)
        for value in values:
            expected = dtype(expected + value)
        execute(f"{prefix}.add.{kind} d, [a], b", kind, a=at, b=values, buffers=[word])
        assert word[0] == expected


@pytest.mark.parametrize("name", ["atom.global", "red.global", "atom", "red"])
def test_atomic_sums_in_global_memory_flush_subnormal_values(name):
    """Inputs and results, to zeros of their signs; what was there is returned as it was."""
    least, tiny = np.float32(2.0**-126), np.float32(2.0**-130)
    words = np.resize(np.float32([tiny, -tiny, 1.5 * least, 0, -0.0, least]), 32)
    values = np.resize(np.float32([tiny, -tiny, -least, tiny, -tiny, tiny]), 32)
    before, at = words.copy(), addresses(words)
    target = "d, " if name.startswith("atom") else ""
    got = execute(f"{name}.add.f32 {target}[a], b", "f32" if target else (), a=at, b=values,
                  buffers=[words])  # fmt: skip
    wanted = np.resize(np.float32([0, -0.0, 0, 0, -0.0, least]), 32)
    assert words.view(np.uint32).tolist() == wanted.view(np.uint32).tolist()
    if target:
        assert got.tolist() == before.tolist()


@pytest.mark.parametrize("space", [".shared", ""])
def test_atomic_sums_in_shared_memory_keep_subnormal_values(space):
    tiny = np.float32(2.0**-130)
    address = "mov.b32 n, slots;" if space else "mov.b64 n, slots; cvta.shared.u64 n, n;"
    got, total = execute(
        f"{SLOTS}; .reg .b{32 if space else 64} n; {address}"
        f"st{space}.f32 [n], 0f00000000; bar.sync 0;"
        f"atom{space}.add.f32 d, [n], a; bar.sync 0; ld{space}.f32 e, [n]",
        ("f32", "f32"), a=np.full(32, tiny),
    )  # fmt: skip
    assert got.tolist() == (np.arange(32) * tiny).tolist()
    assert (total == 32 * tiny).all()


def test_compare_and_swap():
    words = np.array([3, 5], np.uint32)
    at = addresses(words)[[0, 0, 1]]
    compare, new = np.array([3, 3, 3], np.uint32), np.array([8, 9, 10], np.uint32)
    got = execute("atom.acq_rel.gpu.global.cas.b32 d, [a], b, c", "b32", a=at, b=compare, c=new,
                  buffers=[words])  # fmt: skip
    assert got.tolist() == [3, 8, 5]
    assert words.tolist() == [8, 5]


def test_atomic_operations_on_shared_memory():
    got, total = execute(
        f"{SLOTS}; .reg .b32 n; mov.b32 n, slots; st.shared.u32 [n], 100; bar.sync 0;"
        "atom.shared.add.u32 d, [n], a; bar.sync 0; ld.shared.u32 e, [n]",
        ("b32", "b32"), a=np.arange(32, dtype=np.uint32),
    )  # fmt: skip
    assert (total == 100 + 31 * 16).all()
    assert got.tolist() == (100 + np.cumsum(np.arange(32)) - np.arange(32)).tolist()


def test_stray_accesses_are_errors():
    data = np.zeros(32, np.uint32)
    inside = addresses(data)
    for text, shift, message in (
        ("ld.global.u32 d, [a]", 4, "outside every allocation"),
        ("ld.global.u32 d, [a]", 2, "no multiple of 4"),
        ("ld.global.v2.u32 {d, d}, [a]", 0, "no multiple of 8"),
        ("st.global.u32 [a], 1; mov.u32 d, 0", 4, "outside every allocation"),
        ("atom.global.add.u32 d, [a], 1", 4, "outside every allocation"),
    ):
        with pytest.raises(ProgramError, match=message):
            execute(text, "b32", a=inside + np.uint64(shift), buffers=[data])
    for text in ("ld.shared.u32 d, [a]", "st.shared.u32 [a], 1; mov.u32 d, 0"):
        with pytest.raises(ProgramError, match="shared memory"):
            execute(f"{SLOTS}; .reg .b32 n; mov.b32 n, slots; {text}", "b32",
                    a=np.array([SHARED_BASE + 4096], np.uint32))  # fmt: skip


# --- asynchronous copies --------------------------------------------------------------------------


@pytest.mark.parametrize("level, size", [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
@pytest.mark.parametrize("schedule", [EARLY, LATE], ids=["early", "late"])
def test_asynchronous_copies(level, size, schedule):
    """Each lane copies `size` bytes, of which the first b exist; the others become zero."""
    data, out = buffer(32 * size), np.zeros(32 * size, np.uint8)
    exist = np.arange(32, dtype=np.uint32) % (size + 1)
    lanes = np.arange(32, dtype=np.uint32) * size
    words = size // 4
    vector = f".v{words}" if words > 1 else ""
    registers = ", ".join("wxyz"[:words])
    operand = f"{{{registers}}}" if words > 1 else registers
    execute(
        f"{SLOTS}; .reg .b32 n, {registers}; mov.b32 n, slots; add.u32 n, n, c;"
        f"cp.async.{level}.shared.global [n], [a], {size}, b; cp.async.commit_group;"
        "cp.async.wait_group 0; bar.sync 0;"
        f"ld.shared{vector}.b32 {operand}, [n]; st.global{vector}.b32 [f], {operand}",
        (), a=addresses(data, size), b=exist, c=lanes, f=addresses(out, size),
        buffers=[data, out], schedule=schedule,
    )  # fmt: skip
    wanted = data.reshape(32, size).copy()
    for row, count in zip(wanted, exist, strict=True):
        row[count:] = 0
    np.testing.assert_array_equal(out.reshape(32, size), wanted)


@pytest.mark.parametrize("schedule, before", [(EARLY, 2), (LATE, 0)], ids=["early", "late"])
def test_groups_of_copies_are_waited_for_oldest_first(schedule, before):
    """d to f: the two copied words after each wait, as far as they have come for sure."""
    data = np.array([1, 1], np.uint32)
    both = ".reg .b32 x, y; ld.shared.u32 x, [n]; ld.shared.u32 y, [n+4]; add.u32 {}, x, y;"
    steps = "{ %s }"
    text = (
        f"{SLOTS}; .reg .b32 n; mov.b32 n, slots; st.shared.u32 [n], 0; st.shared.u32 [n+4], 0;"
        "cp.async.ca.shared.global [n], [a], 4; cp.async.commit_group;"
        "cp.async.ca.shared.global [n+4], [a+4], 4; cp.async.commit_group;"
        + steps % both.format("d")
        + "cp.async.wait_group 1;"
        + steps % both.format("e")
        + "cp.async.wait_all;"
        + steps % both.format("f")
        + "bar.sync 0"
    )
    got = execute(text, ("b32",) * 3, a=addresses(data)[:1], buffers=[data], schedule=schedule)
    assert [int(values[0]) for values in got] == [before, max(1, before), 2]


# --- matrices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_go_between_shared_memory_and_registers(count, transposed):
    """Rows lie at scattered addresses, which the first 8, 16 or 32 lanes give."""
    rows = buffer(64 * count, np.uint16).reshape(1, 8 * count, 8)
    place = RNG.permutation(32).astype(np.uint32) * 48
    names, trans = ", ".join("defg"[:count]), ".trans" if transposed else ""
    words = [np.resize(rows.reshape(8 * count, 8).view(np.uint32)[:, i], 32) for i in range(4)]
    got = execute(
        f"{SLOTS}; .reg .b32 n; mov.b32 n, slots; add.u32 n, n, a;"
        "st.shared.v4.b32 [n], {w, x, y, z}; bar.sync 0;"
        f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [n]",
        ("b32",) * count, a=place, **dict(zip("wxyz", map(np.ascontiguousarray, words),
                                              strict=True)),
    )  # fmt: skip
    registers = np.stack(got, 1) if count > 1 else got[:, None]
    np.testing.assert_array_equal(registers, matrix.ldmatrix(rows, count, transposed)[0])
    held = {f"r{i}": np.ascontiguousarray(registers[:, i]) for i in range(count)}
    stored = execute(
        f"{SLOTS}; .reg .b32 n; mov.b32 n, slots; add.u32 n, n, a;"
        f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [n], {{{', '.join(held)}}};"
        "bar.sync 0; ld.shared.v4.b32 {d, e, f, g}, [n]",
        ("b32",) * 4, a=place, **held,
    )  # fmt: skip
    found = np.stack(stored, 1)[: 8 * count].view(np.uint16)
    np.testing.assert_array_equal(found, rows[0])


def test_products_of_a_warp():
    """The operands of mma.sync are the registers in the order of the vectors."""
    a, b = buffer(2 * 32 * 4, np.uint32) & 0x3FFF3FFF, buffer(2 * 32 * 2, np.uint32) & 0x3FFF3FFF
    c = RNG.standard_normal(2 * 32 * 4).astype(np.float32)
    fragments = [part.reshape(2, 32, -1) for part in (a, b, c.view(np.uint32))]
    wanted = matrix.mma_sync("m16n8k16", ("f32", "bf16", "bf16", "f32"), *fragments)
    operands = {f"a{i}": np.ascontiguousarray(fragments[0][..., i].ravel()) for i in range(4)}
    operands |= {f"b{i}": np.ascontiguousarray(fragments[1][..., i].ravel()) for i in range(2)}
    operands |= {f"c{i}": np.ascontiguousarray(c.reshape(64, 4)[:, i]) for i in range(4)}
    got = execute(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {d, e, f, g}, {a0, a1, a2, a3},"
        "{b0, b1}, {c0, c1, c2, c3}",
        ("f32",) * 4, **operands,
    )  # fmt: skip
    found = np.stack(got, 1).view(np.uint32).reshape(2, 32, 4)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("schedule", [EARLY, LATE], ids=["early", "late"])
@pytest.mark.parametrize("from_registers", [True, False])
def test_products_of_a_warpgroup(from_registers, schedule):
    """wgmma m64n8k16 with B, and where asked for A, in shared memory in rows of 128 bytes."""
    a, b = (buffer(rows * 16, np.uint16) & 0x3FFF for rows in (64, 8))
    c = RNG.standard_normal(128 * 4).astype(np.float32)
    kinds = ("f32", "f16", "f16")
    rows = np.concatenate([b, a]).reshape(72, 16)
    # The first kilobyte holds B, the next eight hold A.
    encoded = [
        0x2000 >> 4 | 1 << 16 | 64 << 32 | 1 << 62,
        0x2400 >> 4 | 1 << 16 | 64 << 32 | 1 << 62,
    ]
    places = matrix.wgmma_descriptor_addresses(np.uint64(encoded[:1]), 72, 16, 2, False)[0]
    descriptors = np.full((2, 128), np.array(encoded, np.uint64)[:, None], np.uint64)
    # Thread t writes elements t, t + 128, ...
    stores = "".join(f"st.shared.b16 [p{i}], v{i};" for i in range(9))
    written = {f"p{i}": places.reshape(9, 128)[i].astype(np.uint32) for i in range(9)}
    written |= {f"v{i}": np.ascontiguousarray(rows.reshape(9, 128)[i]) for i in range(9)}
    held = a.reshape(1, 64, 16)
    if from_registers:
        # Any registers are some matrix.
        held = buffer(128 * 4, np.uint32).reshape(1, 128, 4) & 0x3FFF3FFF
        written |= {f"a{i}": np.ascontiguousarray(held[0, :, i]) for i in range(4)}
    left = "{a0, a1, a2, a3}" if from_registers else "s"
    majors = "0" if from_registers else "0, 0"
    accumulators = {f"c{i}": np.ascontiguousarray(c.reshape(128, 4)[:, i]) for i in range(4)}
    got = execute(
        ".shared .align 1024 .b8 slots[20480]; .reg .b32 n; mov.b32 n, slots;"
        f"{stores} bar.sync 0; fence.proxy.async.shared::cta; bar.sync 0;"
        + "".join(f"mov.f32 {'defg'[i]}, c{i};" for i in range(4))
        + "wgmma.fence.sync.aligned;"
        f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{d, e, f, g}}, {left}, r, p, 1, -1,"
        f"{majors}; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0",
        ("f32",) * 4, block=128, schedule=schedule, r=descriptors[0], s=descriptors[1],
        p=np.ones(128, bool), **written, **accumulators,
    )  # fmt: skip
    wanted = matrix.wgmma(
        "m64n8k16", kinds, held, b.reshape(1, 8, 16), c.view(np.uint32).reshape(1, 128, 4),
        negate_b=True,
    )  # fmt: skip
    np.testing.assert_array_equal(np.stack(got, 1).view(np.uint32), wanted[0])
