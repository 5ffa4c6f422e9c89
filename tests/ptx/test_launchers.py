"""Each op through its launchers, compiled for two GPUs and executed as PTX, against float64.

The checks are those of the interpreted kernels. Sizes cross a tile in every direction.
"""

import pytest
import torch
from fastvlp_tests import alignment_kernels as alignment
from fastvlp_tests import attention_kernels as attention
from fastvlp_tests import contrastive_formulas as contrastive
from fastvlp_tests import momentum_kernels as momentum
from fastvlp_tests import soft_cross_entropy_kernels as soft_cross_entropy
from fastvlp_tests.alignment_cases import pairs
from fastvlp_tests.momentum_cases import draw as draw_step
from ptx_machine.schedule import Schedule

CPU = torch.device("cpu")
# Each GPU and each dtype once; every_tile.py has all of both.
pytestmark = pytest.mark.parametrize(
    "capability, dtype",
    [
        pytest.param(80, torch.float16, id="sm_80-float16", marks=pytest.mark.thorough),
        pytest.param(90, torch.bfloat16, id="sm_90-bfloat16"),
        pytest.param(90, torch.float32, id="sm_90-float32", marks=pytest.mark.thorough),
    ],
)
# Rows, columns, width: ragged, and aligned with more than one step along the width.
SIZES = pytest.mark.parametrize("m, n, width", [(150, 170, 40), (140, 130, 128)])


def with_overrides(run):
    """The form in which the attention tests call a kernel."""

    def call(overrides, *args, **kwargs):
        assert not overrides
        return run(*args, **kwargs)

    return call


@SIZES
def test_contrastive(run_on_ptx, capability, dtype, m, n, width):
    run = run_on_ptx(capability)
    problem = contrastive.draw(m, n, width, dtype, CPU, offset=3)
    contrastive.check_statistics(run, problem)
    contrastive.check_gradients(run, problem, [0.3, 0.2], 1 << 16)


@SIZES
def test_sigmoid(run_on_ptx, capability, dtype, m, n, width):
    problem = contrastive.draw(m, n, width, dtype, CPU, offset=3, bias=-10.0)
    contrastive.check_sigmoid(run_on_ptx(capability), problem, 1 << 16, weight=0.25)


def test_momentum(run_on_ptx, capability, dtype):
    step = draw_step(33, 100, 72, dtype, CPU, kinds=7)
    momentum.check(run_on_ptx(capability), step)


@pytest.mark.parametrize("queries", [[20, 0, 31], [150, 7]], ids=["fused", "general"])
def test_attention(run_on_ptx, capability, dtype, queries):
    problem = attention.draw(
        queries, [70, 33, 90][: len(queries)], CPU, heads=2, dim=64, dtype=dtype, packed=True,
        masked=True, causal=True, dropout_p=0.1,
    )  # fmt: skip
    attention.check(with_overrides(run_on_ptx(capability)), problem, {})


@pytest.mark.parametrize("queries", [[20, 7], [100, 33]], ids=["one", "halves"])
def test_attention_of_heads_in_two_tiles(run_on_ptx, capability, dtype, queries):
    problem = attention.draw(queries, 70, CPU, heads=2, dim=72, dtype=dtype, masked=True)
    run = run_on_ptx(capability, multiprocessors=1)
    attention.check(with_overrides(run), problem, {})


def test_attention_logits_that_floats_hold_coarsely(run_on_ptx, capability, dtype):
    run = with_overrides(run_on_ptx(capability))
    attention.check_coarse_logits(run, CPU, dtype, 1e9, -1.0, {})


def test_attention_of_odd_heads(run_on_ptx, capability, dtype):
    """Heads whose rows are loaded an element at a time, each lane one element of a sum."""
    problem = attention.draw([20, 7], [40, 33], CPU, dim=17, dtype=dtype, packed=True)
    attention.check(with_overrides(run_on_ptx(capability)), problem, {})


def test_soft_cross_entropy(run_on_ptx, capability, dtype):
    # Two blocks of 2,048 tokens and a part of a third.
    sampled = soft_cross_entropy.draw(5, 5001, CPU)
    soft_cross_entropy.check(run_on_ptx(capability), sampled, dtype)


def test_word_patch_alignment(run_on_ptx, capability, dtype):
    case = pairs(3, 21, 70, 64, dtype, CPU, masks="holes")
    alignment.check(run_on_ptx(capability), case, iterations=10)


def test_word_patch_alignment_of_lost_entries(run_on_ptx, capability, dtype):
    alignment.check_lost_entries(run_on_ptx(capability), CPU, 0.1, 300, dtype)


def test_tiles_are_kept_until_matmuls_have_read_them(run_on_ptx, capability, dtype):
    # Several steps along the width, and asynchronous work as late as it may come.
    case = pairs(2, 21, 40, 256, dtype, CPU)
    run = run_on_ptx(capability, schedules=(Schedule(late=True),))
    alignment.check(run, case, iterations=3)
