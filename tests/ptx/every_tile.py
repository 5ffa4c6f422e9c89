"""Every Triton kernel at every tile of its tables for sm_80 and sm_90, executed as PTX.

    pytest tests/ptx/every_tile.py -n 2 --dist worksteal -k "not tables"
    pytest tests/ptx/every_tile.py -k tables

Not part of a plain test run, which executes each op at a tile or two (test_launchers.py). Each op
goes through its launchers in float32, bfloat16 and float16, at sizes that cross tiles in every
direction, ragged and aligned, and is compared with float64 by the checks of the interpreted
kernels. What passed is kept in pytest's cache while its sources stay the same, so the first command
can be run in parts. The second holds it against the tables and lists it.
"""

from functools import partial

import pytest
import torch
from fastvlp_tests import alignment_kernels as alignment
from fastvlp_tests import attention_kernels as attention
from fastvlp_tests import contrastive_formulas as contrastive
from fastvlp_tests import executed_settings, momentum_cases
from fastvlp_tests import momentum_kernels as momentum
from fastvlp_tests import soft_cross_entropy_kernels as soft_cross_entropy
from fastvlp_tests.alignment_cases import pairs
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from ptx_machine import virtual_process

CPU = torch.device("cpu")
SINGLE = epsilon(torch.float32)
CAPABILITIES = (80, 90)
EVERY_TARGET = [
    pytest.mark.parametrize("capability", CAPABILITIES),
    pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str),
]


def every_target(test):
    for mark in EVERY_TARGET:
        test = mark(test)
    return test


@pytest.fixture
def notes(request):
    """The settings that passed, in this run and earlier ones."""
    return executed_settings.Notes(request.config.cache.mkdir("every_tile"))


@pytest.fixture
def run(request, virtual_gpus, capability, notes, kernel_counts):
    """run(module, function, *args, **kwargs) on the virtual GPU; its launches are noted on success.

    With one multiprocessor to employ, the rows alone choose a tile. `overrides` are attributes of
    the module with other values.
    """

    failures, executed = request.session.testsfailed, {}

    def call(module, *args, overrides=None, **kwargs):
        on = capability, {"multiprocessors": 1}, overrides or {}
        task = virtual_gpus(capability).submit(
            virtual_process.list_settings, *on, module, *args, **kwargs
        )
        result, settings = task.result()
        for setting in settings:
            kernel_counts.executed(capability, str(setting))
        executed.setdefault(module.split(".")[0], set()).update(map(str, settings))
        return result

    yield call
    if request.session.testsfailed == failures:
        for op, settings in executed.items():
            notes.add(op, settings)


@every_target
@pytest.mark.parametrize("m, n, width", [(150, 170, 40), (140, 300, 128)])
@pytest.mark.parametrize("rows, cols", [(True, True), (True, False), (False, True)])
def test_contrastive(run, dtype, m, n, width, rows, cols):
    problem = contrastive.draw(m, n, width, dtype, CPU, offset=3)
    contrastive.check_statistics(run, problem, rows=rows, cols=cols)
    contrastive.check_gradients(run, problem, [0.3, 0.2], 1 << 16, rows=rows, cols=cols)


@every_target
def test_contrastive_in_chunks(run, dtype):
    # Room for one block of rows: several launches, each of which carries its pairs to the next.
    problem = contrastive.draw(300, 90, 32, dtype, CPU, offset=3)
    contrastive.check_statistics(partial(run, overrides={"PAIR_BYTES": 1}), problem)


@every_target
@pytest.mark.parametrize("m, n, width", [(150, 170, 40), (140, 300, 128)])
def test_sigmoid(run, dtype, m, n, width):
    problem = contrastive.draw(m, n, width, dtype, CPU, offset=3, bias=-10.0)
    contrastive.check_sigmoid(run, problem, 1 << 16, weight=0.25)
    loss = run(
        "contrastive.sigmoid", "sigmoid_contrastive", problem.x, problem.y, problem.scale,
        problem.bias, offset=problem.offset, weight=0.25, need_gradients=False,
        workspace_bytes=1 << 16,
    )  # fmt: skip
    true = contrastive.sigmoid_terms(problem, torch.float64)[0].sum()
    near = contrastive.sigmoid_terms(problem, dtype)[0].sum()
    size = true.item() + problem.logits(torch.float64).abs().sum().item()
    assert_as_accurate("loss", loss.loss_sum, near, true, SINGLE * size)


@every_target
@pytest.mark.parametrize(
    "width, kinds", [(72, 0), (72, 7), (128, 7), (256, 0), (256, 7), (320, 7), (512, 7)]
)
def test_momentum(run, dtype, width, kinds):
    # Two slices of the queue, of several tiles each.
    step = momentum_cases.draw(70, 150, width, dtype, CPU, kinds=kinds)
    momentum.check(partial(run, overrides={"SLICES": 3}), step)


# Rows that choose each tile of the tables, and more than any tile holds.
@every_target
@pytest.mark.parametrize(
    "dim, longest, plain",
    [
        *((dim, longest, False) for dim in (64, 128) for longest in (12, 20, 50, 100, 150)),
        *((80, longest, False) for longest in (20, 50)),
        (40, 50, False),
        (40, 150, True),
        (64, 20, True),
        (64, 100, True),
        (128, 150, True),
    ],
)
def test_attention(run, dtype, dim, longest, plain):
    special = {} if plain else {"masked": True, "causal": True, "dropout_p": 0.1}
    queries, keys = [longest, 0, 7], [70, 33, 90]
    problem = attention.draw(
        queries, 90 if plain else keys, CPU, heads=2, dim=dim, dtype=dtype, packed=not plain,
        **special,
    )  # fmt: skip

    def call(overrides, *args, **kwargs):
        return run(*args, overrides=overrides, **kwargs)

    attention.check(call, problem, {})


@every_target
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("teacher", [False, True], ids=["labels", "teacher"])
@pytest.mark.parametrize("cols", [4096, 5001])
def test_soft_cross_entropy(run, dtype, cols, teacher, bias):
    inputs = soft_cross_entropy.draw(5, cols, CPU, bias=bias, teacher=teacher)
    soft_cross_entropy.check(run, inputs, dtype)
    losses = soft_cross_entropy.run(run, inputs, dtype, gradient=False)[0]
    eager, exact = (
        soft_cross_entropy.formula(inputs, d)[0] for d in (torch.float32, torch.float64)
    )
    floor = SINGLE * (inputs["logits"].abs().max().item() + 10) * len(losses) ** 0.5
    assert_as_accurate("losses", losses, eager, exact, floor)


@every_target
@pytest.mark.parametrize("words, patches", [(9, 13), (21, 70), (60, 200), (12, 600)])
def test_word_patch_alignment(run, dtype, words, patches):
    case = pairs(2, words, patches, 72, dtype, CPU, masks="holes")
    alignment.check(run, case, iterations=10)


@EVERY_TARGET[0]
def test_every_setting_of_the_tables_was_executed(virtual_gpus, notes, capability, capsys):
    passed = notes.read(executed_settings.operators())
    here = sorted(setting for setting in passed if setting.startswith(f"sm_{capability} "))
    with capsys.disabled():
        print("\n" + "\n".join(here))
    task = virtual_gpus(capability).submit(virtual_process.table_settings, (capability,))
    # The tables have one entry for both 16-bit dtypes.
    wanted = {
        str(setting.in_dtype(dtype))
        for setting in task.result()
        for dtype in (("bf16", "fp16") if setting.dtype == "bf16" else (setting.dtype,))
    }
    missing = sorted(wanted.difference(here))
    assert wanted and not missing, "never executed:\n" + "\n".join(missing)
