"""Launchers on the virtual GPU: what runs, what is only compiled, and what is found."""

import pytest
import torch
from fastvlp_tests.alignment_cases import pairs
from ptx_machine.errors import HazardError, ProgramError
from ptx_machine.schedule import SCHEDULES

PLANTED = "ptx_machine.planted_launchers"
X = torch.arange(300, dtype=torch.float32)


@pytest.mark.parametrize("capability", [80, 90])
def test_a_launcher_runs(run_on_ptx, capability):
    assert torch.equal(run_on_ptx(capability)(PLANTED, "add_one", X), X + 1)


def test_a_dry_run_compiles_and_runs_nothing(count_on_ptx):
    out, launches = count_on_ptx(90, execute=False)(PLANTED, "add_one", X)
    assert out.isnan().all()
    assert launches == [("add_one_kernel", (3, 1, 1))]


def test_counts_of_a_launch(count_on_ptx):
    out, ((kernel, grid, counts),) = count_on_ptx(90)(PLANTED, "add_one", X)
    assert torch.equal(out, X + 1) and (kernel, grid) == ("add_one_kernel", (3, 1, 1))
    # 300 of 384 lanes, 4 bytes each; 37.5 sectors.
    for kind in ("read", "write"):
        assert counts.bytes["global", kind] == 1200 and counts.sectors[kind] == 38
    assert counts.pipes["memory"] and counts.instructions["ret"] == counts.pipes["control"]


def test_reads_of_memory_that_nothing_wrote(run_on_ptx):
    with pytest.raises(HazardError, match="unwritten: add_one_kernel, line .* block \\(1, 0, 0\\)"):
        run_on_ptx(90)(PLANTED, "add_one_to_half", X)
    half, whole = run_on_ptx(90)(PLANTED, "add_one_to_a_filled_half", X)
    assert torch.equal(half[:150], X[:150] + 1) and torch.equal(half[150:], X[150:])
    assert torch.equal(whole, half + 1)


def test_accesses_past_the_end_of_a_tensor(run_on_ptx):
    with pytest.raises(ProgramError, match="outside every allocation.*block \\(2, 0, 0\\)"):
        run_on_ptx(90)(PLANTED, "add_one_past_the_end", X)


def test_blocks_that_depend_on_one_another(run_on_ptx):
    with pytest.raises(HazardError, match="block conflict: add_one_kernel"):
        run_on_ptx(90)(PLANTED, "add_one_in_two_places", X)


def test_results_that_depend_on_the_order_of_blocks(run_on_ptx):
    with pytest.raises(HazardError, match="order: take_tickets_kernel: out_ptr differs"):
        run_on_ptx(90, schedules=SCHEDULES)(PLANTED, "tickets", 5)
    run_on_ptx(90, schedules=SCHEDULES)(PLANTED, "add_one", X)


def test_unknown_devices_are_refused(run_on_ptx):
    with pytest.raises(ValueError, match="capability must be one of"):
        run_on_ptx(70)(PLANTED, "add_one", X)


def test_kernels_of_the_package_that_ran_are_counted(run_on_ptx, request):
    run_on_ptx(90)(PLANTED, "add_one", X)
    assert not request.node.user_properties
    case = pairs(1, 3, 4, 16, torch.float32, "cpu")
    run_on_ptx(90)(
        "word_patch_alignment.transport", "word_patch_alignment", case.text, case.image,
        *case.masks(), iterations=1,
    )  # fmt: skip
    assert [value for _, value in request.node.user_properties] == ["executed|sm_90|"]
