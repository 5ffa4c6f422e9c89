"""Accesses that barriers at which only a part of the threads waits do, or do not, order."""

import pytest
from fastvlp_tests.planted_hazards import EVERY_SCHEDULE, kinds
from ptx_machine.errors import ProgramError

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


# Warp 0 makes an mbarrier object of 64 arrivals, in the last bytes of the tile.
OBJECT = """
    setp.eq.u32 %p2, %r0, 0;
    @%p2 mbarrier.init.shared.b64 [tile+8184], 64;
    bar.sync 0;
"""
ARRIVE = "mbarrier.arrive.shared.b64 _, [tile+8184], {};"
WAIT = "mbarrier.try_wait.parity.shared.b64 %p3, [tile+8184], {};"
STORE, READ = "st.shared.u32 [%r4], %r0;", "ld.shared.u32 %r6, [%r4+-128];"


@EVERY_SCHEDULE
def test_a_phase_orders_no_arrivals_of_the_next(schedule):
    first, second = ARRIVE.format(2) + STORE + ARRIVE.format(1), WAIT.format(0)
    assert "shared race" in two_warps(first, second + READ, schedule, OBJECT)
    assert not two_warps(STORE + ARRIVE.format(2), second + READ, schedule, OBJECT)
    both = second + ARRIVE.format(1) + WAIT.format(1) + READ
    assert not two_warps(first, both, schedule, OBJECT)


@EVERY_SCHEDULE
def test_a_state_names_one_phase(schedule):
    """Warp 1 waits for phase 0 by its state, when phase 1 may be over too; then for phase 1."""
    first = ARRIVE.format(1) + WAIT.format(0) + STORE + ARRIVE.format(2)
    second = "mbarrier.arrive.shared.b64 %rd5, [tile+8184], 1;"
    second += "mbarrier.try_wait.shared.b64 %p3, [tile+8184], {};" + READ
    assert "shared race" in two_warps(first, second.format("%rd5"), schedule, OBJECT)
    later = second.replace("mbarrier.try", "add.u64 %rd5, %rd5, 1; mbarrier.try").format("%rd5")
    assert not two_warps(first, later, schedule, OBJECT)


@pytest.mark.parametrize("barrier", ["bar.sync {};", "bar.sync {}, 64;", "bar.arrive {}, 128;"])
def test_a_block_has_sixteen_barriers(barrier):
    with pytest.raises(ProgramError, match=r"barriers 0 to 15, not 16 \(block \(0, 0, 0\)"):
        kinds(barrier.format(16))
    assert not kinds(barrier.format(15) + "bar.sync 15, 128;" * ("arrive" in barrier))
