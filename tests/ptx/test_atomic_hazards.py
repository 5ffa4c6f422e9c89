"""Atomic accesses that meet plain ones."""

import pytest
from fastvlp_tests.planted_hazards import EVERY_SCHEDULE, kinds
from ptx_machine.schedule import Schedule

ADD = "red.global.add.u32 [%rd2], 1;"
ONE_BLOCK = "setp.eq.u32 %p1, %r1, {block}; @%p1 {access}"
STORE, READ = "st.global.u32 [%rd2], 1;", "ld.global.u32 %r5, [%rd2];"


@pytest.mark.parametrize("at_once", [None, 1])
@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("access", [STORE, READ])
def test_a_plain_access_of_one_block_and_atomics_of_all(access, block, at_once):
    """The conflict is found whichever comes first, and whoever came last before."""
    plain = ONE_BLOCK.format(block=block, access=access)
    for body in (plain + ADD, ADD + plain):
        found = kinds(body, blocks=3, threads=32, schedule=Schedule(blocks_at_once=at_once))
        assert found == {"block conflict"}
    options = {"threads": 32, "schedule": Schedule(blocks_at_once=at_once)}
    assert not kinds(ADD + ADD, blocks=3, **options)
    assert not kinds(plain.replace("%rd2", "%rd2+2048") + ADD, blocks=3, **options)


@EVERY_SCHEDULE
def test_atomics_of_a_block_hide_no_store(schedule):
    """Each warp counts at one word, which warp 0 has cleared, and warp 1 reads in the end."""
    body = """
        setp.lt.u32 %p1, %r0, 32;
        setp.eq.u32 %p2, %r0, 0;
        @%p2 st.shared.u32 [tile], 0;
        {}
        red.shared.add.u32 [tile], 1;
        {}
        @!%p1 ld.shared.u32 %r6, [tile];
    """
    meet = "bar.sync 0;"
    assert not kinds(body.format(meet, meet), schedule=schedule)
    assert "shared race" in kinds(body.format("", meet), schedule=schedule)
    assert "shared race" in kinds(body.format(meet, ""), schedule=schedule)


@pytest.mark.parametrize(
    "change", ["red.global.add.u32 [%rd2], 1;", "atom.global.cas.b32 %r5, [%rd2], 0, 1;"]
)
def test_a_change_of_fresh_global_memory(change):
    assert kinds(change, written=False) == {"unwritten"}
    assert not kinds(STORE + change, written=False)
    assert not kinds("atom.global.exch.b32 %r5, [%rd2], 1;" + change, written=False)
    assert not kinds(change, written=True)


def test_a_change_of_fresh_shared_memory():
    change = "atom.shared.add.u32 %r5, [%r4], 1;"
    assert kinds(change) == {"unwritten"}
    assert not kinds("st.shared.u32 [%r4], 1;" + change)
    assert not kinds("atom.shared.exch.b32 %r5, [%r4], 1;" + change)
