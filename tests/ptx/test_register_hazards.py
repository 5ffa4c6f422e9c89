"""Registers that a part of the lanes has written."""

from fastvlp_tests.planted_hazards import EVERY_SCHEDULE, kinds

BODY = """
    setp.lt.u32 %p1, %r0, 40;
    {before}
    @%p1 mov.u32 %r5, 7;
    {after}
"""


@EVERY_SCHEDULE
def test_a_register_that_other_lanes_have_written(schedule):
    def found(before, after):
        return kinds(BODY.format(before=before, after=after), schedule=schedule)

    read = "st.global.u32 [%rd2], %r5;"
    assert found("", read) == {"unwritten register"}
    assert found("", "add.u32 %r5, %r5, 1;") == {"unwritten register"}
    assert not found("", f"@%p1 {read}")
    assert not found("mov.u32 %r5, 0;", read)
    assert not found("", f"@!%p1 mov.u32 %r5, 9; {read}")
    assert not found("", f"@!%p1 bra $END; {read} $END:")
    # A predicate: as an operand, and as the guard of an operation and of a branch.
    part = "@%p1 setp.eq.u32 %p2, %r5, 7;"
    for reads in ("selp.b32 %r6, 1, 2, %p2;", "@%p2 mov.u32 %r6, 1;", "@%p2 bra $END; $END:"):
        assert found("", f"{part} {reads}") == {"unwritten register"}, reads
        assert not found("setp.ne.u32 %p2, %r0, %r0;", f"{part} {reads}"), reads
    assert not found("", f"{part} @%p1 selp.b32 %r6, 1, 2, %p2;")
