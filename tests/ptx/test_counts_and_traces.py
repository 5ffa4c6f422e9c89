"""Counts of small hand-written kernels, against what can be counted on paper."""

import numpy as np
import pytest
from ptx_machine import machine, parser
from ptx_machine.counts import Counts
from ptx_machine.l1_cache import L1Cache
from ptx_machine.memory import GlobalMemory
from ptx_machine.program import Program
from ptx_machine.trace import Trace

HEAD = """.target sm_90
.entry one(.param .u64 data)
{
.reg .b64 a, p; .reg .b32 t, s, x, y, u, v; .reg .pred q; .reg .f32 f;
.shared .align 128 .b8 slots[16384];
ld.param.u64 p, [data]; mov.u32 t, %tid.x; mov.u32 s, slots;
"""


def count(body, *, blocks=1, threads=32, size=1 << 16, trace=None, l1=None):
    program = Program(parser.parse(f"{HEAD}{body} ret; }}").kernels["one"])
    data = np.zeros(size + 128, np.uint8)
    start = -(-data.ctypes.data // 128) * 128
    memory = GlobalMemory()
    memory.register_array("data", data)
    counts = Counts(l1=l1)
    observers = (counts,) if trace is None else (counts, trace)
    machine.launch(
        program, (blocks, 1, 1), program.pack([start]), memory, block=(threads, 1, 1),
        dynamic_shared=0, observers=observers,
    )  # fmt: skip
    return counts


@pytest.mark.parametrize(
    "bytes_apart, expected", [(0, 1), (4, 4), (8, 8), (32, 32), (36, 32), (128, 32)]
)
def test_sectors_of_a_strided_load(bytes_apart, expected):
    found = count(f"mad.wide.u32 a, t, {bytes_apart}, p; ld.global.b32 x, [a];")
    assert found.sectors == {"read": expected}
    assert found.requests["global", "read"] == 1
    assert found.bytes["global", "read"] == 128


def test_a_load_between_sectors_touches_one_more():
    found = count("mad.wide.u32 a, t, 4, p; ld.global.b32 x, [a+16];")
    assert found.sectors == {"read": 5}


def test_sectors_of_a_load_of_vectors():
    found = count("mad.wide.u32 a, t, 16, p; ld.global.v4.b32 {x, y, u, v}, [a];")
    assert found.sectors == {"read": 16} and found.requests["global", "read"] == 1
    assert found.bytes["global", "read"] == 512


def test_sectors_are_counted_for_each_warp_and_distinct_bytes_once():
    found = count(
        "mad.wide.u32 a, t, 0, p; ld.global.b32 x, [a]; st.global.b32 [a+64], t;",
        blocks=3, threads=64,
    )  # fmt: skip
    assert found.sectors == {"read": 6, "write": 6}
    assert found.distinct_bytes == {"read": 32, "write": 32, "any": 64}
    assert found.blocks == 3


def test_what_is_read_and_written_is_one_place():
    found = count("mad.wide.u32 a, t, 4, p; ld.global.b32 x, [a]; st.global.b32 [a], x;")
    assert found.distinct_bytes == {"read": 128, "write": 128, "any": 128}


SCALARS = "mad.wide.u32 a, t, 16, p;" + "".join(f"ld.global.b32 x, [a+{4 * i}];" for i in range(4))


def test_a_load_finds_in_l1_what_its_block_has_read():
    """Each of four loads touches the same 16 sectors of a warp; another block reads its own."""
    found = count(SCALARS, blocks=2, threads=64, l1=L1Cache(64))
    assert found.sectors == {"read": 4 * 64} and found.l2_sectors == {"read": 64}
    assert count(SCALARS).l2_sectors == {"read": 64}


@pytest.mark.parametrize("places, misses", [(64, 64), (48, 80), (32, 96)])
def test_l1_holds_as_many_sectors_as_it_has_places(places, misses):
    """Thirty-two sectors, as many others, and the first ones again."""
    loads = "".join(f"ld.global.b32 x, [a+{offset}];" for offset in (0, 1024, 0))
    found = count(f"mad.wide.u32 a, t, 32, p; {loads}", l1=L1Cache(places))
    assert found.sectors == {"read": 96} and found.l2_sectors == {"read": misses}


@pytest.mark.parametrize(
    "access, expected",
    [
        ("ld.global.cg.b32 x, [a];", {"read": 8}),
        ("ld.relaxed.gpu.global.b32 x, [a];", {"read": 8}),
        ("ld.global.nc.b32 x, [a];", {"read": 4}),
        ("st.global.b32 [a], t;", {"write": 8}),
        ("red.global.add.u32 [a], t;", {"atomic": 8}),
        ("cp.async.ca.shared.global [u], [a], 4;", {"read": 4}),
        ("mad.wide.u32 a, t, 16, p; mad.lo.u32 u, t, 16, s;"
         "cp.async.cg.shared.global [u], [a], 16;", {"read": 32}),
    ],
)  # fmt: skip
def test_what_goes_past_l1(access, expected):
    head, tail = "mad.wide.u32 a, t, 4, p; mad.lo.u32 u, t, 4, s;", "cp.async.wait_all;"
    assert count(head + 2 * access + tail, l1=L1Cache(64)).l2_sectors == expected


@pytest.mark.parametrize(
    "bytes_apart, taken", [(0, 1), (4, 1), (8, 2), (16, 4), (128, 32), (132, 1), (12, 1)]
)
def test_bank_conflicts_of_words(bytes_apart, taken):
    found = count(f"mad.lo.u32 u, t, {bytes_apart}, s; ld.shared.b32 x, [u];")
    assert found.wavefronts == {"read": taken}
    assert found.ideal_wavefronts == {"read": 1}


@pytest.mark.parametrize("bytes_apart, taken", [(16, 4), (32, 8), (128, 32), (144, 4)])
def test_bank_conflicts_of_vectors(bytes_apart, taken):
    """Sixteen bytes a lane go eight lanes at a time."""
    found = count(f"mad.lo.u32 u, t, {bytes_apart}, s; st.shared.v4.b32 [u], {{t, t, t, t}};")
    assert found.wavefronts == {"write": taken}
    assert found.ideal_wavefronts == {"write": 4}


def test_bank_conflicts_of_pairs_and_of_one_word():
    """Eight bytes a lane go sixteen lanes at a time; lanes that write one word share a pass."""
    pairs = count("mad.lo.u32 u, t, 8, s; st.shared.v2.b32 [u], {t, t};")
    assert pairs.wavefronts == pairs.ideal_wavefronts == {"write": 2}
    one = count("st.shared.b32 [slots], 1;")
    assert one.wavefronts == one.ideal_wavefronts == {"write": 1}


def test_bank_conflicts_of_ldmatrix():
    """Rows of 128 bytes lie in the same banks, rows of 144 do not."""
    load = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {x}, [u];"
    assert count(f"mad.lo.u32 u, t, 128, s; {load}").wavefronts == {"read": 8}
    assert count(f"mad.lo.u32 u, t, 144, s; {load}").wavefronts == {"read": 1}


def test_asynchronous_copies_count_on_both_sides():
    found = count(
        "mad.wide.u32 a, t, 16, p; mad.lo.u32 u, t, 16, s;"
        "cp.async.cg.shared.global [u], [a], 16; cp.async.wait_all;"
    )
    assert found.sectors == {"read": 16} and found.wavefronts == {"write": 4}


def test_copies_that_some_lanes_leave_out_count_for_the_others():
    """Lanes that copy nothing touch no sector, and fill their words all the same."""
    found = count(
        "mad.wide.u32 a, t, 16, p; mad.lo.u32 u, t, 16, s; setp.lt.u32 q, t, 6;"
        "selp.b32 v, 16, 0, q; cp.async.cg.shared.global [u], [a], 16, v; cp.async.wait_all;"
    )
    assert found.sectors == {"read": 3} and found.bytes["global", "read"] == 96
    assert found.requests["global", "read"] == 1
    assert found.bytes["shared", "write"] == 512 and found.wavefronts == {"write": 4}


def test_atomics():
    found = count("mad.wide.u32 a, t, 4, p; red.global.add.u32 [a], t;", blocks=2)
    assert found.sectors == {"atomic": 8} and found.requests["global", "atomic"] == 2


def test_instructions_by_pipe_and_barriers():
    found = count(
        "add.s32 x, t, t; cvt.rn.f32.u32 f, t; fma.rn.f32 f, f, f, f; ex2.approx.f32 f, f;"
        "bar.sync 0; mul.lo.s32 y, x, x;",
        blocks=2, threads=96,
    )  # fmt: skip
    each = {"alu": 1, "convert": 1, "fma": 1, "mufu": 1, "imad": 1, "barrier": 1}
    assert {pipe: found.pipes[pipe] for pipe in each} == {pipe: 6 for pipe in each}
    assert found.barriers == 6
    assert found.lanes["fma.rn.f32"] == 6 * 32


def test_an_instruction_counts_for_warps_with_a_lane_that_executes_it():
    found = count("setp.lt.u32 q, t, 40; @q add.s32 x, t, t;", threads=96)
    assert found.instructions["add.s32"] == 2 and found.lanes["add.s32"] == 40


def test_a_branch_counts_for_warps_that_take_it():
    found = count("setp.lt.u32 q, t, 7; @q bra over; add.s32 x, t, t; over:", threads=64)
    assert found.instructions["add.s32"] == 2 and found.lanes["add.s32"] == 57
    assert found.instructions["ret"] == 2 and found.pipes["control"] == 1 + 2


def test_matrix_instructions_count_by_shape_and_by_warpgroup():
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    found = count(
        ".reg .b32 a<4>, b<2>; .reg .f32 c<4>;"
        + "".join(f"mov.b32 a{i}, 0;" for i in range(4))
        + "mov.b32 b0, 0; mov.b32 b1, 0;"
        + "".join(f"mov.f32 c{i}, 0f00000000;" for i in range(4))
        + f"{mma} {{c0,c1,c2,c3}}, {{a0,a1,a2,a3}}, {{b0,b1}}, {{c0,c1,c2,c3}};",
        threads=64,
    )
    assert found.tensor == {mma: 2}


def test_counts_of_launches_add_up():
    body = "mad.wide.u32 a, t, 4, p; ld.global.b32 x, [a]; bar.sync 0;"
    one, two = count(body), count(body, blocks=2)
    two.merge(one)
    assert two.blocks == 3 and two.barriers == 3 and two.sectors == {"read": 12}
    assert two.requests["global", "read"] == 3


def test_the_trace_is_that_of_one_warp():
    """Each block takes the loop as often as its number says; by default the middle one counts."""
    body = (
        "mov.u32 u, %ctaid.x; mov.u32 x, 0;"
        "again: add.s32 x, x, t; sub.s32 u, u, 1; setp.gt.s32 q, u, 0; @q bra again;"
    )
    trace = Trace()
    count(body, blocks=5, threads=64, trace=trace)
    opcodes = [step.instruction.opcode for step in trace.steps]
    assert opcodes.count("add.s32") == 2 and opcodes[-1] == "ret"
    last = Trace(4)
    count(body, blocks=5, threads=64, trace=last)
    assert [step.instruction.opcode for step in last.steps].count("add.s32") == 4
