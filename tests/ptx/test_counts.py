"""What the counting observer counts, on kernels whose traffic is known."""

import numpy as np
import pytest
from ptx_machine import machine, parser
from ptx_machine.counts import Counts
from ptx_machine.memory import GlobalMemory
from ptx_machine.program import Program

TEXT = """
.target sm_90a
.entry counted(.param .u64 data) .reqntid {threads}
{{
    .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>; .reg .f32 %f<4>;
    .shared .align 16 .b8 tile[16384];
    ld.param.u64 %rd0, [data];
    mov.u32 %r0, %tid.x;
    mul.lo.u32 %r1, %r0, {step};
    cvt.u64.u32 %rd1, %r1;
    add.u64 %rd2, %rd0, %rd1;
    mov.u32 %r2, tile;
    add.u32 %r3, %r2, %r1;
    {body}
    ret;
}}
"""


def count(body, step=4, blocks=3, threads=64) -> Counts:
    """Thread t has the address of its `step` * t-th byte of data in %rd2, of the tile in
    %r3."""
    wide, memory, counts = np.zeros(16384 + 128, np.uint8), GlobalMemory(), Counts()
    first = -wide.ctypes.data % 128
    data = wide[first : first + 16384]
    memory.register_array("data", data)
    (kernel,) = parser.parse(TEXT.format(step=step, body=body, threads=threads)).kernels.values()
    program = Program(kernel)
    machine.launch(
        program, (blocks, 1, 1), program.pack([data.ctypes.data]), memory, observers=(counts,)
    )
    return counts


def test_instructions_count_once_for_each_warp_with_a_lane():
    counts = count("setp.lt.u32 %p1, %r0, 40; mov.f32 %f1, 0f3F800000;"
                   "@%p1 fma.rn.f32 %f1, %f1, %f1, %f1;")  # fmt: skip
    assert counts.instructions["fma.rn.f32"] == 3 * 2 and counts.lanes["fma.rn.f32"] == 3 * 40
    counts = count("setp.lt.u32 %p1, %r0, 7; @%p1 bra $A; add.u32 %r4, %r0, 1; $A:")
    assert counts.instructions["add.u32"] == 3 * 2 * 2  # the address, and one more
    assert counts.instructions["ret"] == 3 * 2 and counts.pipes["control"] == 3 * (1 + 2)


@pytest.mark.parametrize(
    "load, step, sectors, size",
    [
        ("ld.global.u32 %r4, [%rd2];", 4, 4, 4),
        ("ld.global.u32 %r4, [%rd2];", 32, 32, 4),
        ("ld.global.u32 %r4, [%rd0];", 4, 1, 4),
        ("ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%rd2];", 16, 16, 16),
        ("ld.global.u32 %r4, [%rd2+16];", 4, 5, 4),
    ],
)
def test_sectors_of_global_memory(load, step, sectors, size):
    counts = count(load, step)
    assert counts.sectors["read"] == 3 * 2 * sectors
    assert counts.requests["global", "read"] == 3 * 2
    assert counts.bytes["global", "read"] == 3 * 64 * size


@pytest.mark.parametrize(
    "store, step, wavefronts, ideal",
    [
        ("st.shared.u32 [%r3], %r0;", 4, 1, 1),
        ("st.shared.u32 [%r3], %r0;", 8, 2, 1),
        ("st.shared.u32 [%r3], %r0;", 128, 32, 1),
        ("st.shared.u32 [%r3], %r0;", 132, 1, 1),
        ("st.shared.u32 [tile], 1;", 4, 1, 1),
        ("st.shared.v2.u32 [%r3], {%r0, %r0};", 8, 2, 2),
        ("st.shared.v4.u32 [%r3], {%r0, %r0, %r0, %r0};", 16, 4, 4),
        ("st.shared.v4.u32 [%r3], {%r0, %r0, %r0, %r0};", 128, 32, 4),
    ],
)
def test_wavefronts_of_shared_memory(store, step, wavefronts, ideal):
    counts = count(store, step)
    assert counts.wavefronts["write"] == 3 * 2 * wavefronts
    assert counts.ideal_wavefronts["write"] == 3 * 2 * ideal


def test_copies_of_a_part_of_the_lanes():
    """Lanes that copy nothing touch no sector, and fill their words all the same."""
    counts = count("setp.lt.u32 %p1, %r0, 40; selp.b32 %r4, 4, 0, %p1;"
                   "cp.async.ca.shared.global [%r3], [%rd2], 4, %r4;"
                   "cp.async.wait_all;")  # fmt: skip
    assert counts.sectors["read"] == 3 * (4 + 1) and counts.requests["global", "read"] == 3 * 2
    assert counts.bytes["global", "read"] == 3 * 40 * 4
    assert counts.bytes["shared", "write"] == 3 * 64 * 4 and counts.wavefronts["write"] == 3 * 2


def test_counts_of_launches_add_up():
    one, two = count("ld.global.u32 %r4, [%rd2];"), count("ld.global.u32 %r4, [%rd2];", 32)
    total = one.sectors["read"] + two.sectors["read"]
    one.merge(two)
    assert one.sectors["read"] == total and one.requests["global", "read"] == 12
