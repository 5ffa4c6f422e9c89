"""Each hazard that the machine finds: a kernel that has it, and one that does not."""

import numpy as np
import pytest
from fastvlp_tests.planted_hazards import EVERY_SCHEDULE, kinds, run
from ptx_machine.errors import ProgramError
from ptx_machine.schedule import SCHEDULES, Schedule

# The word of the thread 32 on, in the other warp: written, then read by another thread.
EXCHANGE = """
    st.shared.u32 [%r4], %r0;
    {between}
    xor.b32 %r5, %r2, 128;
    add.u32 %r5, %r5, %r3;
    ld.shared.u32 %r6, [%r5];
    st.global.u32 [%rd2], %r6;
"""


@EVERY_SCHEDULE
def test_shared_memory_read_without_a_barrier(schedule):
    assert "shared race" in kinds(EXCHANGE.format(between=""), schedule=schedule)
    findings, out = run(EXCHANGE.format(between="bar.sync 0;"), schedule=schedule)
    assert not findings.kinds
    assert (out[:64] == np.arange(64) ^ 32).all()


@EVERY_SCHEDULE
def test_a_third_warp_is_not_at_a_named_barrier(schedule):
    """Warps 0 and 1 meet at barrier 1; the word that warp 0 reads is warp 1's, or warp 2's."""
    body = """
        st.shared.u32 [%r4], %r0;
        setp.ge.u32 %p1, %r0, 64;
        @%p1 bra $END;
        bar.sync 1, 64;
        ld.shared.u32 %r6, [tile+{offset}];
    $END:
    """
    assert kinds(body.format(offset=4 * 64), threads=96, schedule=schedule) & {"shared race"}
    assert not kinds(body.format(offset=4 * 32), threads=96, schedule=schedule)


def test_a_named_barrier_some_only_report_at():
    body = """
        setp.ge.u32 %p1, %r0, 32;
        @%p1 bra $CONSUMER;
        st.shared.u32 [%r4], %r0;
        bar.arrive 1, 64;
        bra $END;
    $CONSUMER:
        bar.sync 1, 64;
        ld.shared.u32 %r6, [%r4+-128];
        st.global.u32 [%rd2], %r6;
    $END:
    """
    for schedule in SCHEDULES:
        findings, out = run(body, schedule=schedule)
        assert not findings.kinds and (out[32:64] == np.arange(32)).all()


def test_lanes_of_a_warp_exchange_through_memory():
    body = """
        st.shared.u32 [%r4], %r0;
        {between}
        xor.b32 %r5, %r4, 4;
        ld.shared.u32 %r6, [%r5];
    """
    assert kinds(body.format(between="")) == {"shared race"}
    assert not kinds(body.format(between="bar.warp.sync -1;"))


def test_reads_of_unwritten_memory():
    assert kinds("ld.shared.u32 %r5, [%r4];") == {"unwritten"}
    assert not kinds("st.shared.u32 [%r4], 1; ld.shared.u32 %r5, [%r4];")
    body = "{first} ld.global.u32 %r5, [%rd2];"
    assert kinds(body.format(first=""), written=False) == {"unwritten"}
    assert not kinds(body.format(first="st.global.u32 [%rd2], 7;"), written=False)
    # A half of the word has been written.
    assert "unwritten" in kinds(body.format(first="st.global.u8 [%rd2], %h1;"
                                            .replace("%h1", "%h0")).replace(
        "st.global", "mov.b16 %h0, 1; st.global"), written=False)  # fmt: skip


@pytest.mark.parametrize(
    "access, message",
    [
        ("ld.global.u32 %r5, [%rd2+4096];", r"block \(0, 0, 0\), warp 0, lane 0"),
        ("st.global.u32 [%rd2+-4], 1;", r"outside every allocation.*warp 0, lane 0"),
        ("ld.global.u32 %r5, [%rd2+3844];", r"outside every allocation.*warp 1, lane 31"),
        ("ld.shared.u32 %r5, [%r4+8192];", r"outside the 8192 bytes of shared memory"),
        ("st.shared.u32 [%r4+-4], 1;", r"outside the 8192 bytes of shared memory.*lane 0"),
        ("ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd2];", r"no multiple of 16.*warp 0, lane 1"),
        ("st.shared.v2.b32 [%r4], {%r0, %r0};", r"no multiple of 8.*warp 0, lane 1"),
        ("ld.global.u32 %r5, [%rd2+2];", r"no multiple of 4"),
    ],
)
def test_stray_accesses_name_the_line_and_the_lane(access, message):
    with pytest.raises(ProgramError, match=r"planted, line \d+, .*" + message):
        run(access)


def test_the_last_word_of_an_allocation_may_be_read():
    assert not kinds("ld.global.u32 %r5, [%rd2+3840];")


@EVERY_SCHEDULE
@pytest.mark.parametrize(
    "body",
    [
        # A part of a warp, a part of the block with the rest at another barrier, and a count that
        # is never reached.
        "setp.lt.u32 %p1, %r0, 16; @%p1 bra $A; bar.sync 0; bra $B; $A: bar.sync 1; $B:",
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra $A; bar.sync 0; bra $B; $A: bar.sync 1; $B:",
        "setp.lt.u32 %p1, %r0, 32; @!%p1 bra $B; bar.sync 1, 64; $B:",
    ],
)
def test_divergent_barriers(body, schedule):
    with pytest.raises(ProgramError, match="wait for ever|expect"):
        run(body, schedule=schedule)


def test_a_barrier_under_a_guard_that_a_part_of_the_warp_passes():
    with pytest.raises(ProgramError, match="a part of the lanes"):
        run("setp.lt.u32 %p1, %r0, 16; @%p1 bar.sync 0;")
    assert not kinds("setp.lt.u32 %p1, %r0, 64; @%p1 bar.sync 0;")


def test_a_barrier_told_two_counts():
    body = "shr.u32 %r5, %r0, 5; shl.b32 %r5, %r5, 5; add.u32 %r5, %r5, 32; bar.sync 1, %r5;"
    with pytest.raises(ProgramError, match="told to expect|expects"):
        run("setp.lt.u32 %p1, %r0, 32; selp.b32 %r5, 64, 96, %p1; bar.sync 1, %r5;")
    # Each warp alone at a barrier of its own.
    assert not kinds(body.replace("bar.sync 1, %r5", "shr.u32 %r6, %r0, 5; bar.sync %r6, 32"))


def test_threads_that_have_ended_are_not_waited_for():
    assert not kinds("setp.ge.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0; st.shared.u32 [%r4], 1;")


@pytest.mark.parametrize("blocks_at_once", [None, 1])
def test_blocks_that_touch_one_word(blocks_at_once):
    def found(body):
        schedule = Schedule(blocks_at_once=blocks_at_once)
        return kinds(body, blocks=2, threads=32, schedule=schedule)

    assert found("st.global.u32 [%rd2], 1;") == {"block conflict"}
    # Block 0 reads what block 1 writes, whichever comes first.
    read = (
        "setp.eq.u32 %p1, %r1, {}; @%p1 ld.global.u32 %r5, [%rd2]; @!%p1 st.global.u32 [%rd2], 1;"
    )
    assert found(read.format(0)) == {"block conflict"}
    assert found(read.format(1)) == {"block conflict"}
    assert found("atom.global.add.u32 %r5, [%rd2], 1; st.global.u32 [%rd2], 1;") == {
        "block conflict"
    }
    assert not found("atom.global.add.u32 %r5, [%rd2], 1; red.global.max.u32 [%rd2], 7;")
    own = "shl.b32 %r5, %r1, 7; cvt.u64.u32 %rd3, %r5; add.u64 %rd2, %rd2, %rd3;"
    assert not found(own + "st.global.u32 [%rd2], 1; ld.global.u32 %r6, [%rd2];")
    assert not found("ld.global.u32 %r5, [%rd2];")


def test_bytes_beside_one_another_are_no_conflict():
    """Two blocks write the halves of each word."""
    body = "shl.b32 %r5, %r1, 1; cvt.u64.u32 %rd3, %r5; add.u64 %rd2, %rd2, %rd3; mov.b16 %h0, 1;"
    assert not kinds(body + "st.global.b16 [%rd2], %h0;", blocks=2)


def test_race_in_global_memory_within_a_block():
    body = """
        ld.global.u32 %r5, [%rd0];
        {between}
        st.global.u32 [%rd2], %r5;
    """
    assert kinds(body.format(between="")) == {"global race"}
    assert not kinds(body.format(between="bar.sync 0;"))


def test_lanes_that_store_one_word_at_once():
    assert kinds("st.shared.u32 [tile], %r0;", threads=32) == {"conflicting stores"}
    assert not kinds("st.shared.u32 [tile], 5;", threads=32)
    assert kinds("st.global.u32 [%rd0], %r0;", threads=32) == {"conflicting stores"}
    # Two warps: equal values are what Triton stores where a layout repeats them.
    assert kinds("shr.u32 %r5, %r0, 5; st.shared.u32 [tile], %r5;") == {"shared race"}
    for schedule in SCHEDULES:
        assert not kinds("st.shared.u32 [tile], 5;", schedule=schedule)


COPY = """
    cp.async.ca.shared.global [%r4], [%rd2], 4;
    cp.async.commit_group;
    {before}
    cp.async.wait_group {left};
    {after}
    st.global.u32 [%rd2+2048], %r5;
"""


@EVERY_SCHEDULE
def test_copies_that_are_not_waited_for(schedule):
    read, write = "ld.shared.u32 %r5, [%r4];", "st.shared.u32 [%r4], %r0; mov.b32 %r5, 0;"
    data = np.arange(1024, dtype=np.uint32) + 100

    def found(before="", after="mov.b32 %r5, 0;", left=0):
        body = COPY.format(before=before, after=after, left=left)
        return run(body, schedule=schedule, out=data.copy())

    assert "pending" in found(before=read, after="")[0].kinds
    assert "pending" in found(before=write, after="")[0].kinds
    assert "pending" in found(after=read, left=1)[0].kinds
    findings, out = found(after=read)
    assert not findings.kinds and (out[512:576] == data[:64]).all()
    # The lanes of a warp, and other warps, must meet after the wait.
    other = "xor.b32 %r6, %r4, 128; ld.shared.u32 %r5, [%r6];"
    assert found(after=other)[0].kinds & {"shared race", "pending"}
    assert not found(after="bar.sync 0;" + other)[0].kinds


# A [64, 16] and B [8, 16] of ones, without swizzle; the accumulators are %r40 to %r43.
PRODUCT = """
    mov.b32 %r7, 0x3f803f80;
    st.shared.u32 [%r4], %r7; st.shared.u32 [%r4+512], %r7; st.shared.u32 [%r4+1024], %r7;
    st.shared.u32 [%r4+1536], %r7; st.shared.u32 [%r4+2048], %r7;
    {first_fence}
    bar.sync 0;
    {second_fence}
    mov.b32 %r40, 0; mov.b32 %r41, 0; mov.b32 %r42, 0; mov.b32 %r43, 0;
    mov.b64 %rd5, {a}; mov.b64 %rd6, {b};
    mov.pred %p1, 1;
    {wgmma_fence}
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
        {{%r40, %r41, %r42, %r43}}, %rd5, %rd6, %p1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    {before}
    wgmma.wait_group.sync.aligned 0;
    {after}
    st.global.u32 [%rd2], %r40;
"""
FENCE, WGMMA_FENCE = "fence.proxy.async.shared::cta;", "wgmma.fence.sync.aligned;"


def product(schedule, **parts):
    def descriptor(start, leading, stride):
        return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32

    parts = {"first_fence": FENCE, "second_fence": "", "wgmma_fence": WGMMA_FENCE} | parts
    body = PRODUCT.format(**{
        "before": "", "after": "", "a": descriptor(1024, 1024, 128),
        "b": descriptor(3072, 128, 128), **parts,
    })  # fmt: skip
    return run(body, threads=128, schedule=schedule)


@EVERY_SCHEDULE
def test_products_of_a_warpgroup(schedule):
    for parts in ({}, {"first_fence": "", "second_fence": FENCE}):
        findings, out = product(schedule, **parts)
        assert not findings.kinds
        assert (out[:128].view(np.float32) == 16).all()


@EVERY_SCHEDULE
@pytest.mark.parametrize(
    "kind, parts",
    [
        ("proxy", {"first_fence": ""}),
        ("wgmma.fence", {"wgmma_fence": ""}),
        ("pending", {"before": "st.shared.u32 [%r4], %r7;"}),
        ("pending registers", {"before": "mov.b32 %r50, %r41;"}),
        ("pending registers", {"before": "mov.b32 %r41, 0;"}),
        # Another warp's product may still read the tile.
        ("shared race", {"after": "st.shared.u32 [%r4+2048], %r7;"}),
        ("wgmma.fence", {"after": "add.f32 %r40, %r40, %r40;"
                         "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
                         " {%r40, %r41, %r42, %r43}, %rd5, %rd6, %p1, 1, 1, 0, 0;"
                         "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"}),
    ],
)  # fmt: skip
def test_misused_products(schedule, kind, parts):
    assert product(schedule, **parts)[0].kinds == {kind}


@EVERY_SCHEDULE
def test_a_tile_may_be_refilled_when_all_warps_have_waited(schedule):
    findings, _ = product(schedule, after="bar.sync 0; st.shared.u32 [%r4], %r7;")
    assert not findings.kinds
