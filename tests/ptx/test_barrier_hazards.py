"""Accesses that barriers at which only a part of the threads waits do, or do not, order."""

import numpy as np
import pytest
from test_hazards import EVERY_SCHEDULE, kinds, run

# Warp 0 runs the first part, warp 1 the second.
TWO_WARPS = """
    {before}
    setp.ge.u32 %p1, %r0, 32;
    @%p1 bra $SECOND;
    {first}
    bra $END;
$SECOND:
    {second}
$END:
"""


def two_warps(first, second, schedule, before="", threads=64):
    body = TWO_WARPS.format(before=before, first=first, second=second)
    return kinds(body, schedule=schedule, threads=threads)


@EVERY_SCHEDULE
def test_a_report_orders_only_what_came_before_it(schedule):
    report, store = "bar.arrive 1, 64;", "st.shared.u32 [%r4], %r0;"
    read = "bar.sync 1, 64; ld.shared.u32 %r6, [%r4+-128];"
    assert "shared race" in two_warps(report + store, read, schedule)
    assert not two_warps(store + report, read, schedule)


@EVERY_SCHEDULE
def test_who_only_reports_learns_nothing(schedule):
    """Warp 0 overwrites what warp 1 reads before it comes to the barrier."""
    before = "st.shared.u32 [%r4], %r0; bar.sync 0;"
    first, second = "{} 1, 64; st.shared.u32 [%r4], 7;", "ld.shared.u32 %r6, [%r4+-128];"
    second += "bar.sync 1, 64;"
    assert two_warps(first.format("bar.arrive"), second, schedule, before) == {"shared race"}
    assert not two_warps(first.format("bar.sync"), second, schedule, before)


@EVERY_SCHEDULE
def test_a_second_barrier_orders_what_came_after_the_first(schedule):
    store = "st.shared.u32 [%r4{}], %r0;"
    first = store.format("") + "bar.arrive 1, 64;" + store.format("+512") + "{}"
    second = "bar.sync 1, 64; {} ld.shared.u32 %r6, [%r4+384];"
    assert "shared race" in two_warps(first.format(""), second.format(""), schedule)
    again = first.format("bar.arrive 2, 64;"), second.format("bar.sync 2, 64;")
    assert not two_warps(*again, schedule)
