"""A kernel around a few instructions that have a hazard or do not, and what the machine finds."""

import numpy as np
import pytest
from ptx_machine import machine, parser
from ptx_machine.findings import Findings
from ptx_machine.hazards import watchers
from ptx_machine.memory import GlobalMemory
from ptx_machine.program import Program
from ptx_machine.schedule import SCHEDULES, Schedule

HEAD = """
.target sm_90a
.entry planted(.param .u64 out) .reqntid {threads}
{{
    .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<64>; .reg .b64 %rd<16>; .reg .f32 %f<8>;
    .shared .align 1024 .b8 tile[8192];
    ld.param.u64 %rd0, [out];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    shl.b32 %r2, %r0, 2;
    mov.u32 %r3, tile;
    add.u32 %r4, %r3, %r2;
    cvt.u64.u32 %rd1, %r2;
    add.u64 %rd2, %rd0, %rd1;
    {body}
    ret;
}}
"""


def run(body, *, threads=64, blocks=1, out=None, written=True, schedule=None):
    """(findings, the output array) of a kernel. Registers: %r0 thread, %r1 block, %r2 four times
    the thread, %r3 the tile, %r4 the thread's word of it; %rd0 the output, %rd2 its word."""
    out = np.zeros(1024, np.uint32) if out is None else out
    memory, findings = GlobalMemory(), Findings()
    memory.register_array("out", out, written)
    (kernel,) = parser.parse(HEAD.format(threads=threads, body=body)).kernels.values()
    program = Program(kernel)
    machine.launch(
        program, (blocks, 1, 1), program.pack([out.ctypes.data]), memory,
        schedule=schedule or Schedule(), observers=watchers(findings),
    )  # fmt: skip
    return findings, out


def kinds(body, **options):
    findings, _ = run(body, **options)
    return findings.kinds


EVERY_SCHEDULE = pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=lambda s: f"{s.warps}-{s.order}-{'late' if s.late else 'early'}"
)
