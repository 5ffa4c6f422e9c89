"""Blocks whose last warp has fewer threads than lanes."""

import numpy as np
import pytest
from ptx_machine import machine, parser
from ptx_machine.errors import ProgramError
from ptx_machine.memory import GlobalMemory
from ptx_machine.program import Program

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"
# Each thread puts its number into shared memory; after the barrier it stores that of the last.
EXCHANGE = (
    HEAD
    + """
.visible .entry exchange(.param .u64 out)
{
    .reg .b32 %r<5>; .reg .b64 %rd<4>;
    .shared .align 4 .b8 slots[400];
    ld.param.u64 %rd1, [out];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, slots;
    mad.lo.s32 %r3, %r1, 4, %r2;
    st.shared.u32 [%r3], %r1;
    bar.sync 0;
    mov.u32 %r4, %ntid.x;
    mad.lo.s32 %r4, %r4, 4, %r2;
    ld.shared.u32 %r4, [%r4+-4];
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r4;
    ret;
}
"""
)


def run(text, name, block, out):
    program = Program(parser.parse(text).kernels[name])
    memory = GlobalMemory()
    memory.register_array("out", out)
    machine.launch(program, (1, 1, 1), program.pack([out.ctypes.data]), memory, block=block)


@pytest.mark.parametrize("threads", [1, 31, 32, 33, 70])
def test_threads_that_do_not_exist_neither_run_nor_hold_up_a_barrier(threads):
    out = np.full(80, 99, np.uint32)
    run(EXCHANGE, "exchange", (threads, 1, 1), out)
    assert (out[:threads] == threads - 1).all() and (out[threads:] == 99).all()


def test_blocks_of_several_dimensions_are_counted_as_a_whole():
    out = np.full(80, 99, np.uint32)
    text = EXCHANGE.replace("mov.u32 %r1, %tid.x;", "mov.u32 %r1, %tid.y;")
    text = text.replace("%ntid.x", "%ntid.y")
    run(text, "exchange", (1, 5, 1), out)
    assert (out[:5] == 4).all() and (out[5:] == 99).all()


def test_a_shuffle_needs_the_lanes_that_its_mask_names():
    text = EXCHANGE.replace("bar.sync 0;", "shfl.sync.bfly.b32 %r1, %r1, 1, 31, -1;")
    with pytest.raises(ProgramError, match="lanes of a warp"):
        run(text, "exchange", (5, 1, 1), np.zeros(80, np.uint32))
