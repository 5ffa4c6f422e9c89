"""mbarrier and bulk copies of tensors as instructions: who waits for whom, and when bytes come."""

import numpy as np
import pytest
from ptx_machine import asynchronous
from ptx_machine.errors import ProgramError, UnknownForm
from ptx_machine.findings import Findings
from ptx_machine.hazards import watchers
from ptx_machine.schedule import SCHEDULES, Schedule
from ptx_machine.single import execute

EARLY, LATE = Schedule(), Schedule(late=True)
OBJECT = ".shared .align 128 .b8 slots[8192]; .shared .align 8 .b64 object; .reg .b32 o, n;"
START = f"{OBJECT} mov.b32 o, object; mov.b32 n, slots;"
LANES = np.arange(32, dtype=np.uint32)


def one_of(lanes):
    return lanes == 0


def test_a_phase_ends_with_the_last_arrival():
    """d: the phase that each lane saw; e to g: phase 0 after 31 arrivals, after 32, phase 1."""
    state, before, after, parity = execute(
        f"{START} @p mbarrier.init.shared::cta.b64 [o], 32; bar.sync 0; mov.b64 d, 0;"
        "@!p mbarrier.arrive.shared::cta.b64 d, [o]; bar.sync 0;"
        "mbarrier.test_wait.parity.shared::cta.b64 e, [o], 0;"
        "@p mbarrier.arrive.release.cta.shared::cta.b64 _, [o]; bar.sync 0;"
        "mbarrier.test_wait.shared::cta.b64 f, [o], d;"
        "mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 g, [o], 1",
        ("b64", "pred", "pred", "pred"), a=LANES, p=one_of(LANES),
    )  # fmt: skip
    assert not state.any() and not before.any() and after.all() and not parity.any()


def test_arrivals_count_as_many_as_they_say():
    passed = execute(
        f"{START} @p mbarrier.init.shared.b64 [o], 5; bar.sync 0;"
        "@p mbarrier.arrive.shared.b64 _, [o], 5; bar.sync 0;"
        "mbarrier.test_wait.parity.shared.b64 d, [o], 0",
        "pred", a=LANES, p=one_of(LANES),
    )  # fmt: skip
    assert passed.all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["early", "late", "apart", "reverse", "random"])
def test_one_warp_waits_for_another(schedule):
    """Warp 1 arrives after its store; warp 0 waits, then reads."""
    lanes = np.arange(64, dtype=np.uint32)
    second = lanes >= 32
    got = execute(
        f"{START} @p mbarrier.init.shared.b64 [o], 32; bar.sync 0; @q bra produce;"
        "mbarrier.try_wait.parity.shared.b64 r, [o], 0; ld.shared.u32 d, [n]; bra done;"
        "produce: st.shared.u32 [n], 42; mbarrier.arrive.shared.b64 _, [o]; mov.u32 d, 0; done:"
        "bar.sync 0",
        "b32", a=lanes, p=one_of(lanes), q=second, r=second, block=64, schedule=schedule,
    )  # fmt: skip
    assert (got == np.where(second, 0, 42)).all()


def test_loops_of_waiting_end():
    got = execute(
        f"{START} @p mbarrier.init.shared.b64 [o], 1; bar.sync 0;"
        "@p mbarrier.arrive.expect_tx.shared.b64 _, [o], 0;"
        "again: mbarrier.try_wait.parity.shared.b64 q, [o], 0; @!q bra.uni again; mov.u32 d, 1",
        "b32", a=LANES, p=one_of(LANES), q=one_of(LANES),
    )  # fmt: skip
    assert got.all()


def test_waiting_for_nobody_is_an_error():
    with pytest.raises(ProgramError, match="phase that never ends"):
        execute(f"{START} @p mbarrier.init.shared.b64 [o], 33; bar.sync 0;"
                "mbarrier.arrive.shared.b64 _, [o]; mbarrier.try_wait.parity.shared.b64 d, [o], 0",
                "pred", a=LANES, p=one_of(LANES))  # fmt: skip


@pytest.mark.parametrize(
    "text, message",
    [
        ("mbarrier.arrive.shared.b64 _, [o]", "mbarrier.init has made"),
        ("mbarrier.init.shared.b64 [o], 0", "count of 1"),
        ("@p mbarrier.init.shared.b64 [o], 1; bar.sync 0; mbarrier.arrive.shared.b64 _, [o]",
         "no more arrivals"),
        ("@p mbarrier.init.shared.b64 [o], 1; @p mbarrier.inval.shared.b64 [o];"
         "@p mbarrier.arrive.shared.b64 _, [o]", "mbarrier.init has made"),
        ("mbarrier.init.shared.b64 [o+4], 1", "no multiple of 8"),
    ],
)  # fmt: skip
def test_wrong_uses_are_errors(text, message):
    with pytest.raises(ProgramError, match=message):
        execute(f"{START} {text}", (), p=one_of(LANES))
    with pytest.raises(UnknownForm):
        execute(f"{START} mbarrier.arrive.noComplete.shared.b64 _, [o], 1", (), p=one_of(LANES))


# --- tiles ----------------------------------------------------------------------------------------


def tensor(rows, cols):
    """A float32 matrix, and a tensor map of it with boxes of 4 x 4, where copies may find it."""
    data = np.arange(1, rows * cols + 1, dtype=np.float32).reshape(rows, cols)
    memory = np.zeros(192, np.uint8)
    tensor_map = memory[-memory.ctypes.data % 64 :][:128]
    tensor_map[:] = asynchronous.encode_tiled(
        data.ctypes.data, "f32", [cols, rows], [4 * cols], [4, 4]
    )
    return data, tensor_map


def padded(data, x, y):
    """The box of 4 x 4 with its corner at column x, row y."""
    wide = np.zeros((data.shape[0] + 8, data.shape[1] + 8), np.float32)
    wide[4:-4, 4:-4] = data
    return wide[y + 4 : y + 8, x + 4 : x + 8].ravel()


COPY = (
    "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [n], [a, {b, c}], [o]"
)


@pytest.mark.parametrize("schedule, early", [(EARLY, True), (LATE, False)], ids=["early", "late"])
def test_tiles_come_with_their_bytes(schedule, early):
    """d, e: a word of the tile before and after the phase of its 64 bytes is over."""
    data, tensor_map = tensor(5, 8)
    x, y = 6, -2
    before, after = execute(
        f"{START} .reg .b32 m; mov.u32 m, %tid.x; and.b32 m, m, 15; mad.lo.u32 m, m, 4, n;"
        "st.shared.f32 [m], 0fBF800000; @p mbarrier.init.shared.b64 [o], 1; bar.sync 0;"
        f"@p mbarrier.arrive.expect_tx.shared.b64 _, [o], 64; @p {COPY}; bar.sync 0;"
        "ld.shared.f32 d, [m]; mbarrier.try_wait.parity.shared.b64 q, [o], 0;"
        "ld.shared.f32 e, [m]",
        ("f32", "f32"), a=np.full(32, tensor_map.ctypes.data, np.uint64),
        b=np.full(32, x, np.int32), c=np.full(32, y, np.int32), p=one_of(LANES), q=one_of(LANES),
        buffers=[data, tensor_map], schedule=schedule,
    )  # fmt: skip
    wanted = padded(data, x, y)
    np.testing.assert_array_equal(after[:16], wanted)
    np.testing.assert_array_equal(before[:16], wanted if early else np.full(16, -1.0))


@pytest.mark.parametrize("schedule, early", [(EARLY, True), (LATE, False)], ids=["early", "late"])
def test_tiles_go_to_global_memory_by_groups(schedule, early):
    """d: a word of the tensor before its group was waited for."""
    data, tensor_map = tensor(5, 8)
    out = data.copy()
    at = np.array([out.ctypes.data], np.uint64)
    asynchronous.replace(tensor_map[None], "global_address", at)
    before = execute(
        f"{START} .reg .b32 m; mov.u32 m, %tid.x; and.b32 m, m, 15; mad.lo.u32 m, m, 4, n;"
        "st.shared.f32 [m], 0fBF800000; fence.proxy.async.shared::cta; bar.sync 0;"
        "@p cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [a, {b, c}], [n];"
        "@p cp.async.bulk.commit_group; ld.global.f32 d, [e]; @p cp.async.bulk.wait_group.read 0",
        "f32", a=np.full(32, tensor_map.ctypes.data, np.uint64),
        b=np.full(32, 6, np.int32), c=np.full(32, 3, np.int32), p=one_of(LANES),
        e=np.full(32, out[4:, 7:].ctypes.data, np.uint64), buffers=[out, tensor_map],
        schedule=schedule,
    )  # fmt: skip
    wanted = data.copy()
    wanted[3:, 6:] = -1
    np.testing.assert_array_equal(out, wanted)
    assert (before == (-1 if early else data[4, 7])).all()


@pytest.mark.parametrize("schedule", [EARLY, LATE], ids=["early", "late"])
@pytest.mark.parametrize("waits", [True, False])
def test_hazards_of_tiles_that_nobody_waits_for(schedule, waits):
    """Another warp reads the tile, after the phase or without waiting for it."""
    data, tensor_map = tensor(5, 8)
    lanes, findings = np.arange(64, dtype=np.uint32), Findings()
    wait = "mbarrier.try_wait.parity.shared.b64 q, [o], 0;" if waits else ""
    execute(
        f"{START} .reg .b32 m; mov.u32 m, %tid.x; and.b32 m, m, 15; mad.lo.u32 m, m, 4, n;"
        "@p mbarrier.init.shared.b64 [o], 1; bar.sync 0;"
        f"@p mbarrier.arrive.expect_tx.shared.b64 _, [o], 64; @p {COPY}; {wait}"
        "ld.shared.f32 d, [m]",
        "f32", a=np.full(64, tensor_map.ctypes.data, np.uint64), b=np.zeros(64, np.int32),
        c=np.zeros(64, np.int32), p=one_of(lanes), q=one_of(lanes), buffers=[data, tensor_map],
        block=64, schedule=schedule, observers=watchers(findings),
    )  # fmt: skip
    expected = set() if waits else {"pending"} if schedule.late else {"shared race"}
    assert findings.kinds == expected


def test_stray_copies_are_errors():
    data, tensor_map = tensor(5, 8)
    given = dict(a=np.full(32, tensor_map.ctypes.data, np.uint64), b=np.zeros(32, np.int32),
                 c=np.zeros(32, np.int32), p=one_of(LANES))  # fmt: skip
    start = f"{START} @p mbarrier.init.shared.b64 [o], 1; bar.sync 0;"
    with pytest.raises(ProgramError, match="outside every allocation"):
        execute(f"{start} @p {COPY}", (), **given, buffers=[tensor_map])
    with pytest.raises(ProgramError, match="multiple of 128"):
        execute(f"{start} add.u32 n, n, 64; @p {COPY}", (), **given, buffers=[data, tensor_map])
    with pytest.raises(ProgramError, match="shared memory"):
        execute(f"{start} add.u32 n, n, 8192; @p {COPY}", (), **given, buffers=[data, tensor_map])
    with pytest.raises(UnknownForm, match="2 coordinates"):
        execute(f"{start} @p {COPY.replace('{b, c}', '{b}')}", (), **given)
