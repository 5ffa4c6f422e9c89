"""matmul against float64 and torch.mm, and the linear layer on it against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.models.base import Model
from fastvlp.nn import Linear, linear
from fastvlp.ops import explain, matmul, matmul_reference
from fastvlp.ops import matmul as matmul_op

SINGLE = epsilon(torch.float32)
TILES = torch.ops.fastvlp.matmul_available()
SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 130]


@pytest.fixture(autouse=True)
def _every_size(monkeypatch):
    """Small matrices take the tiles as well."""
    module = __import__("fastvlp.ops.matmul.api", fromlist=["matmul"])
    monkeypatch.setattr(module, "LEAST_WORK", 0)
    monkeypatch.setattr(module, "LEAST_SIDE", 0)


def draw(rows, cols, layout, scale=1.0, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    if layout == "rows":
        x = torch.randn(rows, cols, generator=generator)
    elif layout == "columns":
        x = torch.randn(cols, rows, generator=generator).T
    elif layout == "wide":
        x = torch.randn(rows, cols + 5, generator=generator)[:, 2 : cols + 2]
    elif layout == "every second":
        x = torch.randn(2 * rows, 2 * cols, generator=generator)[::2, ::2]
    else:
        x = torch.randn(rows, 1, generator=generator).expand(rows, cols)
    return x.to(device).mul(scale) if scale != 1.0 else x.to(device)


LAYOUTS = ["rows", "columns", "wide", "every second", "expanded"]


def check(a, b, bias=None):
    ours, eager = matmul(a, b, bias), matmul_reference(a, b, bias)
    wide = None if bias is None else bias.double()
    exact = matmul_reference(a.double(), b.double(), wide)
    # What rounding the largest sums once costs, for products that eager has exact by luck.
    terms = a.double().abs() @ b.double().abs()
    assert_as_accurate("matmul", ours, eager, exact, SINGLE * terms.norm().item())
    return ours


@settings(max_examples=200)
@given(
    m=st.sampled_from(SIZES),
    n=st.sampled_from(SIZES),
    k=st.sampled_from([*SIZES, 511, 512, 513, 1100]),
    layout_a=st.sampled_from(LAYOUTS),
    layout_b=st.sampled_from(LAYOUTS),
    scale=st.sampled_from([1.0, 1e-28, 1e15]),
    with_bias=st.booleans(),
    seed=st.integers(0, 3),
)
def test_matches_float64(device, m, n, k, layout_a, layout_b, scale, with_bias, seed):
    a = draw(m, k, layout_a, scale, seed, device)
    b = draw(k, n, layout_b, 1.0, seed + 1, device)
    bias = draw(1, n, "rows", scale, seed + 2, device)[0] if with_bias else None
    check(a, b, bias)


def test_sums_of_long_rows_round_less_than_torch(device):
    a, b = draw(256, 4000, "columns", device=device), draw(4000, 192, "rows", seed=1, device=device)
    exact = a.double() @ b.double()
    ours, eager = (matmul(a, b) - exact).norm(), (torch.mm(a, b) - exact).norm()
    assert ours <= 1.1 * eager


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_empty(device, shape):
    m, n, k = shape
    bias = torch.arange(float(n), device=device)
    got = matmul(torch.ones(m, k, device=device), torch.ones(k, n, device=device), bias)
    assert torch.equal(got, bias.expand(m, n) + k)


def test_rows_of_every_magnitude(device):
    """Each row is as exact as its own size allows."""
    scale = 10.0 ** torch.arange(-24, 25, 2, device=device)[:, None]
    a, b = draw(25, 96, "rows", device=device) * scale, draw(96, 40, "rows", seed=1, device=device)
    exact = a.double() @ b.double()
    for ours, eager, row, terms in zip(
        matmul(a, b), torch.mm(a, b), exact, a.double().abs() @ b.double().abs(), strict=True
    ):
        assert_as_accurate("row", ours, eager, row, SINGLE * terms.norm().item())


def test_largest_floats_stay_finite(device):
    """They round up to infinity in bfloat16."""
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([largest, -largest, largest * (1 - 2**-10), 3.39e38], device=device)
    a = torch.zeros(4, 40, device=device)
    a[:, 7] = values
    b = torch.zeros(40, 33, device=device)
    b[7] = 0.5
    torch.testing.assert_close(
        matmul(a, b), (values / 2)[:, None].expand(4, 33), rtol=2 * SINGLE, atol=0
    )


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row_and_column(device, value):
    a = draw(70, 50, "rows", device=device)
    a[3, 4] = value
    b = draw(50, 40, "rows", seed=1, device=device).abs() + 0.1
    got, expected = matmul(a, b), torch.mm(a, b)
    assert torch.isfinite(got[torch.arange(70) != 3]).all()
    # Where a product of infinity's parts takes part the sum may be NaN, but never finite.
    assert not torch.isfinite(got[3]).any() and not torch.isfinite(expected[3]).any()


def test_parts_add_up_exactly(device):
    """A matmul with the identity gives each float back, bit for bit."""
    x = draw(64, 96, "rows", device=device) * 10.0 ** draw(64, 96, "rows", 5, 3, device).round()
    assert torch.equal(matmul(x, torch.eye(96, device=device)), x)
    assert torch.equal(matmul(torch.eye(64, device=device), x), x)


def test_the_same_bits_every_time_and_for_any_number_of_threads(device):
    a, b = draw(300, 700, "rows", device=device), draw(700, 200, "columns", seed=1, device=device)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results += [matmul(a, b), matmul(a, b)]
    finally:
        torch.set_num_threads(threads)
    if TILES:
        assert all(torch.equal(results[0], other) for other in results[1:])
    assert all(torch.allclose(results[0], other) for other in results[1:])


@pytest.mark.parametrize("layout_b", ["rows", "columns"])
def test_gradients(device, layout_b):
    a, b = draw(70, 90, "rows", device=device), draw(90, 50, layout_b, seed=1, device=device)
    bias, upstream = draw(1, 50, "rows", seed=2, device=device)[0], draw(70, 50, "rows", seed=3)
    found = {}
    for name, function, dtype in (
        ("ours", matmul, torch.float32),
        ("eager", matmul_reference, torch.float32),
        ("exact", matmul_reference, torch.float64),
    ):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (a, b, bias)]
        out = function(*leaves)
        found[name] = torch.autograd.grad(out, leaves, upstream.to(out.device, dtype))
    for i, name in enumerate(("a", "b", "bias")):
        floor = SINGLE * found["exact"][i].norm().item()
        assert_as_accurate(name, found["ours"][i], found["eager"][i], found["exact"][i], floor)
    assert found["ours"][1].stride() == b.stride()


def test_second_derivative(device):
    a, b = draw(40, 33, "rows", device=device), draw(33, 36, "rows", seed=1, device=device)
    found = []
    for function in (matmul, matmul_reference):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(x, y).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (x, y)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_adds_to_what_is_there(device):
    if not TILES:
        assert "AMX" in str(explain("matmul", *[torch.ones(300, 300)] * 2))
        return
    a, b = draw(45, 600, "rows"), draw(600, 70, "columns", seed=1)
    out = torch.randn(45, 80)
    before = out.clone()
    torch.ops.fastvlp.add_matmul(a, b, -0.5, True, out[:, 3:73])
    exact = before[:, 3:73].double() - 0.5 * (a.double() @ b.double())
    eager = torch.addmm(before[:, 3:73], a, b, alpha=-0.5)
    assert_as_accurate("sum", out[:, 3:73], eager, exact, SINGLE * exact.norm().item())
    assert torch.equal(out[:, :3], before[:, :3]) and torch.equal(out[:, 73:], before[:, 73:])
    torch.ops.fastvlp.add_matmul(a, b, 1.0, False, out[:, 3:73])
    assert torch.equal(out[:, 3:73], torch.ops.fastvlp.matmul(a, b, None))


def test_opcheck_and_compile():
    a = draw(40, 48, "rows").requires_grad_()
    b, bias = draw(48, 36, "columns", seed=1).requires_grad_(), torch.randn(36, requires_grad=True)
    if TILES:
        torch.library.opcheck(torch.ops.fastvlp.matmul.default, (a, b, bias))
    compiled = torch.compile(lambda *x: matmul(*x).relu(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b, bias), matmul(a, b, bias).relu())


@pytest.mark.parametrize(
    ("reason", "setting"),
    [
        ("AMX", ("FASTVLP_CPU_ISA", "portable")),
        ("asks for another" if TILES else "AMX", ("FASTVLP_BACKEND", "reference")),
    ],
)
def test_says_why_torch_runs_instead(monkeypatch, reason, setting):
    monkeypatch.setenv(*setting)
    x = torch.ones(40, 40)
    found = explain("matmul", x, x)
    assert found.chosen == "reference" and reason in str(found)
    assert torch.equal(matmul(x, x), torch.mm(x, x))


def test_other_dtypes_and_less_precision_are_torchs():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        x = torch.randn(70, 70).to(dtype)
        assert torch.equal(matmul(x, x), torch.mm(x, x))
    x = torch.randn(70, 70)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert "less precision" in str(explain("matmul", x, x))
        assert torch.equal(matmul(x, x), torch.mm(x, x))
    finally:
        torch.set_float32_matmul_precision(before)


def test_small_matrices_are_torchs(monkeypatch):
    monkeypatch.undo()
    x = torch.ones(8, 8)
    assert "faster for matrices as small" in str(explain("matmul", x, x))


def test_small_matrices_take_no_detour(monkeypatch):
    """What torch's matmul of them takes is less than a look at all backends."""
    monkeypatch.undo()
    a, b, bias = draw(3, 40, "rows"), draw(40, 50, "columns", seed=1), torch.randn(50)
    module = __import__("fastvlp.ops.matmul.api", fromlist=["matmul"])
    chosen = []
    monkeypatch.setattr(module, "choose", lambda *_: chosen.append(1) or "reference")
    assert torch.equal(matmul(a, b), torch.mm(a, b))
    parameter = torch.nn.Parameter(bias)
    assert torch.equal(matmul(a, b, parameter), torch.addmm(bias, a, b))
    assert not chosen
    with torch.autocast("cpu", torch.bfloat16):  # which is off inside of the operator
        found = matmul(a, b, bias)
    assert torch.equal(found, torch.addmm(bias, a, b))
    matmul(a.double(), b.double())
    assert len(chosen) == 2


def test_small_matrices_run_nowhere_in_place_of_what_is_asked_for(monkeypatch):
    monkeypatch.undo()
    x = torch.ones(8, 8)
    for variable, value in (("FASTVLP_BACKEND", "triton"), ("FASTVLP_CPU_ISA", "mmx")):
        monkeypatch.setenv(variable, value)
        with pytest.raises(RuntimeError, match="no implementation can run"):
            matmul(x, x)
        monkeypatch.delenv(variable)
    monkeypatch.setenv("FASTVLP_BACKEND", "native")
    if TILES:
        assert explain("matmul", x, x).chosen == "native" and torch.equal(matmul(x, x), 8 * x)


def test_linear_of_a_few_rows_looks_at_no_backend(monkeypatch):
    monkeypatch.undo()
    module = __import__("fastvlp.ops.matmul.api", fromlist=["matmul"])
    monkeypatch.setattr(module, "runs_natively", lambda *_: pytest.fail("was asked"))
    x, weight, bias = draw(30, 768, "rows"), draw(64, 768, "rows", seed=1), torch.randn(64)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, torch.ones(2, 2)), "a: expected a torch.Tensor"),
        ((torch.ones(2, 2), torch.ones(2, 2).int()), "b: expected a floating-point dtype"),
        ((torch.ones(2, 2, 2), torch.ones(2, 2)), "a: expected 2 dimensions"),
        ((torch.ones(2, 3), torch.ones(2, 3)), "b: expected 3 rows"),
        ((torch.ones(2, 3), torch.ones(3, 2).double()), "b: expected"),
        ((torch.ones(2, 3), torch.ones(3, 2), torch.ones(3)), "bias: expected 2 values"),
        ((torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 1)), "bias: expected 1 dimensions"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        matmul_op(*arguments)


@pytest.mark.parametrize("shape", [(48,), (5, 48), (3, 4, 48), (0, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_pytorchs(device, shape, bias):
    torch.manual_seed(0)
    layer = Linear(48, 40, bias=bias).to(device)
    x = torch.randn(shape, device=device)
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear(x, layer.weight, layer.bias), expected, rtol=1e-5, atol=1e-5)


def test_linear_under_autocast_is_pytorchs():
    layer, x = Linear(64, 64), torch.randn(70, 64)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, F.linear(x, layer.weight, layer.bias))


def test_reference_is_pytorchs():
    class Lone(Model):
        def __init__(self):
            super().__init__(None)
            self.layer = Linear(64, 64)

    model, x = Lone().use_reference(), torch.randn(70, 64)
    assert torch.equal(model.layer(x), F.linear(x, model.layer.weight, model.layer.bias))
