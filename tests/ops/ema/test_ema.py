"""The multi-tensor momentum update and AdamW step against float64, and what they refuse."""

import math

import pytest
import torch
from fastvlp_tests.ema_cases import DTYPES, LAYOUTS, SHAPES, tensor
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.ops import (
    adamw_ema,
    adamw_ema_reference,
    ema,
    ema_reference,
    explain,
    last_exceeding,
)

ISAS = torch.ops.fastvlp.cpu_instruction_sets().split(",")


@given(
    shapes=SHAPES,
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2, st.sampled_from([None, *DTYPES])),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    decay=st.sampled_from([0.0, 0.3, 0.5, 0.995, 1.0]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    isa=st.sampled_from(ISAS),
)
@settings(max_examples=120)
def test_ema_matches_float64(monkeypatch, device, shapes, dtypes, layouts, decay, scale, isa):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)

    def drawn(which, seed):
        return [
            tensor(shape, dtypes[which], layouts[which], scale, seed + i, device)
            for i, shape in enumerate(shapes)
        ]

    momentum, source = drawn(0, 0), drawn(1, 50)
    copies = None if dtypes[2] is None else drawn(2, 90)
    exact = [t.double() for t in momentum]
    ema_reference(exact, [t.double() for t in source], decay)
    eager = [t.clone() for t in momentum]
    ema_reference(eager, source, decay)
    addresses = [t.data_ptr() for t in momentum]
    assert explain("ema", momentum, source, decay, copies).chosen == "native"
    assert ema(momentum, source, decay, copies) is None
    assert [t.data_ptr() for t in momentum] == addresses
    for i, (ours, theirs, wanted) in enumerate(zip(momentum, eager, exact, strict=True)):
        floor = (epsilon(ours.dtype) * wanted.norm()).item() + 1e-44
        if wanted.isfinite().all() and ours.isfinite().all():
            assert_as_accurate(f"momentum[{i}]", ours, theirs, wanted, floor)
        else:  # beyond the range of float16
            assert torch.equal(ours, theirs)
        if copies is not None and dtypes[0] == torch.float32:
            assert torch.equal(copies[i], ours.to(dtypes[2]))


@pytest.mark.parametrize("layout", ["gaps", "transposed"])
def test_what_lies_between_elements_is_left_alone(device, layout):
    m = tensor((6, 10), torch.float32, layout, device=device)
    around = m._base if layout == "gaps" else m
    holes = around.isnan().clone()
    ema([m], [torch.zeros(6, 10, device=device)], 0.5)
    assert torch.equal(around.isnan(), holes) and m.isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_thousand_steps_match_the_float64_recurrence(monkeypatch, device, isa):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    g = torch.Generator().manual_seed(1)
    momentum = torch.randn(4099, generator=g).to(device)
    exact, eager = momentum.double(), [momentum.clone()]
    copy = torch.empty_like(momentum, dtype=torch.bfloat16)
    base = torch.randn(4099, generator=g)
    for _ in range(1000):
        source = (base + 0.1 * torch.randn(4099, generator=g)).to(device)
        ema([momentum], [source], 0.995, [copy])
        torch._foreach_lerp_(eager, [source], 0.005)
        exact.lerp_(source.double(), 1 - 0.995)
    assert_as_accurate("momentum", momentum, eager[0], exact)
    error = (momentum.double() - exact).abs().max() / exact.abs().max()
    assert error < 8 * epsilon(torch.float32)  # at most a few roundings, of 1000
    assert torch.equal(copy, momentum.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ISAS)
def test_every_half_precision_rounding_is_torchs(monkeypatch, dtype, isa):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    all_bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    g = torch.Generator().manual_seed(0)
    ulp = torch.finfo(dtype).eps * all_bits
    values = torch.cat(
        [all_bits, all_bits + ulp * torch.rand(2**16, generator=g), all_bits + ulp / 2]
    )
    for momentum in (values.clone(), torch.cat([values.clone(), values[:1]])[:-1].clone()):
        copy = torch.empty(momentum.shape, dtype=dtype)
        ema([momentum], [momentum.clone()], 1.0, [copy])
        wanted = momentum.to(dtype)
        assert torch.equal(copy.isnan(), wanted.isnan())
        assert torch.equal(copy.nan_to_num(1.0), wanted.nan_to_num(1.0))
    widened = torch.zeros(2**16)
    source = all_bits.to(dtype)
    ema([widened], [source], 0.0)
    assert torch.equal(widened.nan_to_num(7.0), source.float().nan_to_num(7.0))


def test_an_average_that_equals_its_source_stays(device):
    values = torch.randn(1000, device=device)
    for decay in (0.999, 0.7, 0.3, 0.0, 1.0):
        momentum = values.clone()
        for _ in range(5):
            ema([momentum], [values], decay)
        assert torch.equal(momentum, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decay_tensor(device, dtype):
    m, s = torch.randn(2, 1000, device=device)
    by_number, by_tensor = m.clone(), m.clone()
    ema([by_number], [s], torch.tensor(0.9, dtype=dtype).item())
    ema([by_tensor], [s], torch.tensor(0.9, dtype=dtype, device=device))
    assert torch.equal(by_number, by_tensor)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_check_finite_writes_nothing(device, bad, dtype):
    momentum = [torch.randn(n, device=device) for n in (5, 40_000, 0, 3)]
    source = [torch.randn(n, device=device).to(dtype) for n in (5, 40_000, 0, 3)]
    copies = [torch.ones_like(t, dtype=torch.bfloat16) for t in momentum]
    before = [t.clone() for t in momentum]
    source[1][39_999] = source[0][2] = bad
    assert ema(momentum, source, 0.5, copies, check_finite=True).item() == 1
    assert all(map(torch.equal, momentum, before)) and all((t == 1).all() for t in copies)
    source[1][39_999] = source[0][2] = 0.0
    assert ema(momentum, source, 0.5, copies, check_finite=True).item() == -1
    assert not torch.equal(momentum[0], before[0])


def test_check_finite_of_the_reference():
    momentum, source = [torch.ones(3).double()], [torch.tensor([1.0, math.nan, 2.0]).double()]
    assert ema(momentum, source, 0.5, check_finite=True).item() == 0
    assert (momentum[0] == 1).all()
    source[0][1] = 1e300  # finite in float64
    assert ema(momentum, source, 0.5, check_finite=True).item() == -1
    assert momentum[0][2] == 1.5


def test_tied_tensors_move_once(device):
    m, s = torch.zeros(10, device=device), torch.ones(10, device=device)
    ema([m, m], [s, s], 0.5)
    assert (m == 0.5).all()
    with pytest.raises(RuntimeError, match=r"momentum\[1\]: shares memory with momentum\[0\]"):
        ema([m, m], [s, s + 1], 0.5)
    assert (m == 0.5).all()
    ema([m], [m], 0.5)  # its own source
    assert (m == 0.5).all()


def test_overlaps_are_refused(device):
    memory = torch.zeros(100, device=device)
    s = torch.ones(50, device=device)
    with pytest.raises(RuntimeError, match="overlaps"):
        ema([memory[:50], memory[40:90]], [s, s], 0.5)
    with pytest.raises(RuntimeError, match=r"overlaps"):
        ema([memory[:50]], [memory[25:75]], 0.5)
    with pytest.raises(RuntimeError, match="expected every element at an address of its own"):
        ema([torch.zeros(1, device=device).expand(50)], [s], 0.5)
    assert (memory == 0).all()
    ema([memory[:50]], [torch.ones(1, device=device).expand(50)], 0.5)
    assert (memory[:50] == 0.5).all()


def test_nothing_to_do(device):
    assert ema([], [], 0.5) is None
    assert ema([], [], 0.5, check_finite=True).item() == -1
    ema([torch.empty(0, device=device)], [torch.empty(0, device=device)], 0.5)
    adamw_ema([], [], [], [], step=1, lr=0.1)


def test_tensors_that_move_are_seen(device):
    """The table of addresses is kept; other memory, shapes or dtypes must not find an old one."""
    s = torch.ones(64, device=device)
    for dtype in DTYPES:
        for shape in ((64,), (8, 8), (4, 16)):
            m = torch.zeros(shape, dtype=dtype, device=device)
            ema([m], [s.view(shape)], 0.5)
            assert (m == 0.5).all()


X = torch.zeros(3)


@pytest.mark.parametrize(
    "args, error, message",
    [
        (([X], [X, X], 0.5), ValueError, "source: expected 1 tensors as in momentum, got 2"),
        (([X], [X], 0.5, [X, X]), ValueError, "copies: expected 1 tensors"),
        (([X], [[1.0]], 0.5), TypeError, r"source\[0\]: expected a torch.Tensor, got list"),
        (([X], [torch.zeros(4)], 0.5), ValueError, r"source\[0\]: expected the shape of momentum"),
        (([X], [X.long()], 0.5), TypeError, r"source\[0\]: expected a floating-point dtype"),
        (([X], [X.to("meta")], 0.5), ValueError, r"source\[0\]: expected the device"),
        (([X], [X.to_sparse()], 0.5), TypeError, r"source\[0\]: expected a dense tensor"),
        (([X], [X + 1], 1.5), ValueError, "decay: expected a value between 0 and 1, got 1.5"),
        (([X], [X + 1], math.nan), ValueError, "decay: expected a value between"),
        (([X], [X + 1], torch.tensor(-0.5)), ValueError, "decay: expected a value between"),
        (([X], [X + 1], torch.ones(2)), ValueError, "decay: expected one value"),
        (([X], [X + 1], torch.tensor(1)), TypeError, "decay: expected float32 or float64"),
        (([X], [X + 1], "0.5"), TypeError, "decay: expected a number or a tensor"),
    ],
)
def test_bad_arguments_reach_no_kernel(monkeypatch, args, error, message):
    monkeypatch.setattr(torch.ops.fastvlp, "ema_update", lambda *_: pytest.fail("was called"))
    with pytest.raises(error, match=message):
        ema(*args)
    assert (X == 0).all()


def test_explain_and_forced_backend(monkeypatch):
    assert explain("ema", [X], [X]).chosen == "native"
    assert explain("ema", [X.double()], [X]).chosen == "reference"
    assert explain("adamw_ema", [X], [X], [X], [X]).chosen == "native"
    m, s = torch.zeros(3), torch.ones(3)
    ema([m], [s], 1.0)
    monkeypatch.setattr(torch.ops.fastvlp, "ema_update_again", lambda *_: pytest.fail("was called"))
    monkeypatch.setenv("FASTVLP_BACKEND", "reference")
    ema([m], [s], 0.75)
    assert (m == 0.25).all()
    monkeypatch.setenv("FASTVLP_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="no implementation can run"):
        ema([m], [s], 0.75)


def test_versions_count(device):
    m = torch.zeros(3, device=device)
    before = m._version
    ema([m], [torch.ones(3, device=device, requires_grad=True)], 0.5)
    assert m._version > before and not m.requires_grad


ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@given(
    shapes=SHAPES,
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    extras=st.sampled_from([(0, 0, 0), (1, 0, 0), (1, 1, 1), (0, 1, 0)]),
    step=st.sampled_from([1, 7, 1000]),
    scale=st.sampled_from([1e-8, 1.0, 1e3]),
    maximize=st.booleans(),
    isa=st.sampled_from(ISAS),
)
@settings(max_examples=80)
def test_adamw_matches_float64(
    monkeypatch, device, shapes, dtypes, layouts, extras, step, scale, maximize, isa
):
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
    weight, gradient, low = dtypes
    kinds = [weight, gradient, torch.float32, torch.float32, torch.float32, low, low]
    lists = []
    for i, kind in enumerate(kinds):
        # Moments of the size that gradients of this scale leave: else a step leaves float16.
        size = scale if i in (1, 2) else 1.0
        made = [
            tensor(s, kind, layouts[i % 2], size, 10 * i + j, device) for j, s in enumerate(shapes)
        ]
        if i == 3:
            made = [t.abs_().mul_(scale * scale) for t in made]
        lists.append(made if i < 4 or extras[i - 4] else [])
    options = ADAMW | {"step": step, "maximize": maximize, "decay": 0.9}
    exact = [[t.double() for t in each] for each in lists]
    eager = [[t.clone() for t in each] for each in lists]
    adamw_ema_reference(*exact, **options)
    adamw_ema_reference(*eager, **options)
    adamw_ema(*lists, **options)
    for name, ours, theirs, wanted in zip(
        ("weights", "gradients", "first", "second", "momentum", "copies", "momentum copies"),
        lists, eager, exact, strict=True,
    ):  # fmt: skip
        for a, b, c in zip(ours, theirs, wanted, strict=True):
            rounding = 2 * (epsilon(a.dtype) + epsilon(torch.float32)) * c.norm().item()
            assert_as_accurate(name, a, b, c, rounding)


def test_adamw_refuses_before_it_writes(device):
    def lists():
        return [[torch.ones(3, device=device), torch.ones(4, device=device)] for _ in range(4)]

    weights, gradients, first, second = lists()
    for call, error, message in (
        (lambda: adamw_ema(weights, gradients, first, second, step=0, lr=0.1), ValueError, "step:"),
        (lambda: adamw_ema(weights, gradients, first, second, step=1, lr=-1), ValueError, "lr:"),
        (lambda: adamw_ema(weights, gradients, first, second, step=1, lr=0.1, betas=(0.9, 1.0)),
         ValueError, r"betas\[1\]"),
        (lambda: adamw_ema(weights, gradients[:1], first, second, step=1, lr=0.1),
         ValueError, "gradients: expected 2 tensors"),
        (lambda: adamw_ema(weights, gradients, first, second[::-1], step=1, lr=0.1),
         ValueError, r"second_moments\[0\]: expected the shape"),
        (lambda: adamw_ema(weights, gradients, first, second, [], [], first, step=1, lr=0.1),
         ValueError, "momentum_copies: expected none without momentum"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    stop = torch.tensor(1, device=device)
    adamw_ema(weights, gradients, first, second, step=1, lr=0.1, nonfinite=stop)
    assert all((t == 1).all() for t in (*weights, *first, *second))


def test_last_exceeding(device):
    tensors = [torch.ones(10, device=device) for _ in range(4)]
    assert last_exceeding(tensors).item() == -1
    tensors[2][3] = -20.0
    assert last_exceeding(tensors, 10.0).item() == 2
    tensors[0][3] = math.nan
    assert last_exceeding(tensors, 100.0).item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, dtype):
    ops = torch.ops.fastvlp

    def random(kind=torch.float32):
        return [torch.rand(n, device=device).to(kind) for n in (5, 33)]

    flag = torch.tensor(-1, device=device)
    decay = torch.tensor(0.9, device=device)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.last_exceeding, (random(dtype), 1e4))
    torch.library.opcheck(ops.ema_update, (random(), random(dtype), random(dtype), None, 0.9, flag))
    torch.library.opcheck(
        ops.ema_update, (random(), random(dtype), [], decay, 0.0, None), test_utils=checks
    )
    torch.library.opcheck(
        ops.adamw_ema,
        (random(), random(dtype), random(), random(), random(), random(dtype), random(dtype), 1e-3,
         0.9, 0.999, 1e-8, 0.01, 3.0, False, decay, 0.0, flag),
    )  # fmt: skip


def test_compiles_without_a_graph_break(device):
    torch.compiler.reset()

    def update(momentum, source, copies, decay):
        found = ema(momentum, source, decay, copies, check_finite=True)
        return found + 1, momentum[0] * 2

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    decay = torch.tensor(0.9, device=device)
    source = [torch.randn(n, device=device, requires_grad=True) for n in (40, 7)]
    results = []
    for function in (compiled, update):
        momentum = [torch.ones(n, device=device) for n in (40, 7)]
        copies = [torch.zeros(n, device=device, dtype=torch.bfloat16) for n in (40, 7)]
        out = function(momentum, source, copies, decay)
        results.append([*out, *momentum, *copies])
    for ours, eager in zip(*results, strict=True):
        assert torch.equal(ours, eager)
