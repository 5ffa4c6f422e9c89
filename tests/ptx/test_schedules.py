"""The orders in which blocks and warps run, and results that depend on them."""

import numpy as np
import pytest
from ptx_machine import machine, parser
from ptx_machine.comparison import Comparison
from ptx_machine.findings import Findings
from ptx_machine.memory import GlobalMemory
from ptx_machine.program import Program
from ptx_machine.schedule import SCHEDULES, Schedule

# Each warp takes a ticket (%r5); the first lane of it has %p1.
TICKETS = """
.target sm_90
.entry tickets(.param .u64 out) .reqntid 64
{{
    .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>;
    ld.param.u64 %rd0, [out];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    and.b32 %r2, %r0, 31;
    setp.eq.u32 %p1, %r2, 0;
    mov.b32 %r5, 0;
    @%p1 atom.global.add.u32 %r5, [%rd0], 1;
    shl.b32 %r6, %r1, 1;
    shr.u32 %r7, %r0, 5;
    add.u32 %r6, %r6, %r7;
    {body}
    ret;
}}
"""
# The number of the warp goes to the place of its ticket.
ORDERED = """
    shl.b32 %r5, %r5, 2;
    cvt.u64.u32 %rd1, %r5;
    add.u64 %rd1, %rd1, %rd0;
    @%p1 st.global.u32 [%rd1+8], %r6;
"""


def run_all(body, schedules):
    (kernel,) = parser.parse(TICKETS.format(body=body)).kernels.values()
    program, memory, findings = Program(kernel), GlobalMemory(), Findings()
    out, results = np.zeros(64, np.uint32), []
    memory.register_array("out", out)
    compared = Comparison(memory, findings, "tickets")
    for schedule in schedules:
        compared.begin()
        machine.launch(
            program, (5, 1, 1), program.pack([out.ctypes.data]), memory, schedule=schedule
        )
        compared.end(schedule)
        results.append(out.copy())
    return findings, results


def test_results_that_depend_on_the_order_are_found():
    findings, _ = run_all(ORDERED, SCHEDULES)
    assert findings.kinds == {"order"}
    findings, results = run_all("", SCHEDULES)
    assert not findings.kinds and all(out[0] == 10 for out in results)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (Schedule(warps="apart"), [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]),
        (Schedule(warps="apart", blocks_at_once=1), list(range(10))),
        (Schedule(warps="apart", order="reverse", blocks_at_once=1), list(range(10))[::-1]),
    ],
)
def test_warps_and_blocks_run_in_the_order_of_the_schedule(schedule, expected):
    _, (out,) = run_all(ORDERED, [schedule])
    assert out[2:12].tolist() == expected


def test_a_random_order_has_every_warp_once_and_depends_on_the_seed():
    orders = []
    for seed in (1, 1, 2):
        schedule = Schedule(warps="apart", order="random", seed=seed, blocks_at_once=1)
        orders.append(run_all(ORDERED, [schedule])[1][0][2:12].tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(10)) == sorted(orders[2])


@pytest.mark.parametrize("wrong", [{"warps": "both"}, {"order": "backwards"}])
def test_unknown_schedules_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Schedule(**wrong)
