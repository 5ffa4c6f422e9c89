"""What soft_cross_entropy refuses, and how torch sees its operators."""

import pytest
import torch
from fastvlp_tests.soft_cross_entropy_cases import draw, run

from fastvlp.ops import explain, soft_cross_entropy
from fastvlp.ops.soft_cross_entropy import register
from fastvlp.ops.soft_cross_entropy.matmuls import matmul_dtype
from fastvlp.ops.soft_cross_entropy.register import make_plan

H, E, B, Y = torch.zeros(4, 8), torch.zeros(20, 8), torch.zeros(20), torch.zeros(4).long()


@pytest.mark.parametrize(
    "args, error, message",
    [
        (([1.0], E, B, Y), TypeError, "hidden: expected a torch.Tensor, got list"),
        ((H.long(), E, B, Y), TypeError, "hidden: expected a floating-point dtype"),
        ((H, E[:, :5], B, Y), ValueError, r"weight: expected \[V, D\] .*\(4, 8\), got \(20, 5\)"),
        ((H, E[0], B, Y), ValueError, r"weight: expected \[V, D\]"),
        ((H, E[:0], B[:0], Y), ValueError, "weight: expected V and D of at least 1"),
        ((H, E.half(), B, Y), TypeError, "weight: expected the dtype of hidden, torch.float32"),
        ((H, E.to("meta"), B, Y), ValueError, "weight: expected the device of hidden, cpu"),
        ((H, E, B[:5], Y), ValueError, r"bias: expected shape \(20,\), got \(5,\)"),
        ((H, E, B, Y[:3]), ValueError, r"labels: expected shape \(4,\), .*got \(3,\)"),
        ((H, E, B, Y.float()), TypeError, "labels: expected int64 or int32, got torch.float32"),
        ((H, E, B, 3), TypeError, "labels: expected a torch.Tensor, got int"),
        ((H, E, B, Y.to("meta")), ValueError, "labels: expected the device of hidden"),
    ],
)
def test_bad_head(args, error, message):
    with pytest.raises(error, match=message):
        soft_cross_entropy(*args)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"alpha": 0.5}, ValueError, "alpha: expected 0 without a teacher, got 0.5"),
        ({"teacher_weight": E}, ValueError, "teacher_hidden: expected a tensor with"),
        ({"teacher_hidden": H}, ValueError, "teacher_weight: expected a tensor with"),
        (
            {"teacher_hidden": H, "teacher_weight": E[:9]},
            ValueError,
            "teacher_weight: expected the vocabulary of weight, 20, got 9",
        ),
        (
            {"teacher_hidden": H[:2], "teacher_weight": E},
            ValueError,
            r"teacher_hidden: expected the rows \(4,\) of hidden",
        ),
        (
            {"teacher_hidden": H, "teacher_weight": E, "alpha": 1.5},
            ValueError,
            "alpha: expected a value from 0 to 1, got 1.5",
        ),
        *(
            (
                {"teacher_hidden": H, "teacher_weight": E, "alpha": torch.tensor(alpha)},
                ValueError,
                f"alpha: expected a value from 0 to 1, got {alpha}",
            )
            for alpha in (1.5, -0.25, float("nan"), 2)
        ),
        (
            {"teacher_hidden": H, "teacher_weight": E, "alpha": "x"},
            TypeError,
            "alpha: expected a number or a tensor, got str",
        ),
        (
            {"teacher_hidden": H, "teacher_weight": E, "alpha": torch.ones(2)},
            ValueError,
            r"alpha: expected one value on cpu, got shape \(2,\)",
        ),
        ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an int, got float"),
        ({"max_rows": -1}, ValueError, "max_rows: expected a number of rows or None, got -1"),
        ({"max_rows": 2}, ValueError, "max_rows: expected at least the 4 labelled rows, got 2"),
        ({"reduction": "max"}, ValueError, "reduction: expected one of .*got 'max'"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes: expected a positive number"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        soft_cross_entropy(H, E, B, Y, **options)


@pytest.mark.parametrize("label", [20, -1])
def test_label_out_of_range_names_the_row(label):
    labels = torch.zeros(2, 2).long()
    labels[1, 0] = label
    with pytest.raises(ValueError, match=rf"labels: expected 0 to 19 .*got {label} at \[1, 0\]"):
        soft_cross_entropy(H.view(2, 2, 8), E, B, labels)


def test_explain(monkeypatch):
    found = explain("soft_cross_entropy", H, E, B, Y)
    assert found.chosen == "native" and "CUDA" in found.reasons["triton"][0]
    assert explain("soft_cross_entropy", H.double(), E.double()).chosen == "reference"
    monkeypatch.setenv("FASTVLP_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="(?s)no implementation can run.*not triton.*CUDA"):
        soft_cross_entropy(H, E, B, Y)


def test_forced_reference(monkeypatch, device):
    case = draw(9, 8, 50, torch.float32, device)
    kernel = case.call(soft_cross_entropy)
    monkeypatch.setenv("FASTVLP_BACKEND", "reference")
    torch.testing.assert_close(case.call(soft_cross_entropy), kernel)


@pytest.mark.parametrize("workspace", [1 << 10, 1 << 28])
def test_second_derivative_is_refused(device, workspace):
    case = draw(9, 8, 50, torch.float32, device)
    case.hidden.requires_grad_()
    loss = case.call(soft_cross_entropy, workspace_bytes=workspace)
    (gradient,) = torch.autograd.grad(loss, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*soft_cross_entropy_reference"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher", [True, False])
def test_opcheck(device, dtype, teacher):
    case = draw(9, 8, 70, dtype, device, teacher=teacher)
    plan = make_plan(9, 70, matmul_dtype(case.hidden), 1 << 12)
    kept = torch.zeros(plan.group_floats, device=device)
    head = (case.hidden, case.weight, case.bias, case.labels)
    other = (case.teacher_hidden, case.teacher_weight, case.teacher_bias)
    common = (*head, *other, torch.tensor(0.4, device=device), -100)
    ops = torch.ops.fastvlp
    losses = (*common, kept, plan.group_rows, plan.chunk_rows, True, False)
    weights = torch.full((9,), 0.25, device=device)
    plans = (True, plan.group_rows, plan.chunk_rows, [True, True, False])
    torch.library.opcheck(ops.soft_cross_entropy_losses, losses)
    torch.library.opcheck(ops.soft_cross_entropy_gradients, (*common, weights, kept, *plans))
    torch.library.opcheck(ops.soft_cross_entropy_losses_and_gradients, (*common, *plans[1:]))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("max_rows", [None, 25])
@pytest.mark.parametrize("workspace", [1 << 14, 1 << 28])
def test_compiles_without_a_graph_break(device, dynamic, max_rows, workspace):
    torch.compiler.reset()

    def loss(*args, **options):
        options |= {"max_rows": max_rows, "workspace_bytes": workspace}
        return soft_cross_entropy(*args, **options) * 2

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (24, 31):
        case = draw(rows, 16, 300, torch.float32, device)
        for ours, eager in zip(run(compiled, case), run(loss, case), strict=True):
            torch.testing.assert_close(ours, eager)


def test_fake_tensors_on_a_device_that_is_not_here():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        hidden = torch.empty(9, 8, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(70, 8, device="cuda")
        labels = torch.empty(9, device="cuda", dtype=torch.int64)
        scalar, kept = torch.empty((), device="cuda"), torch.empty(0, device="cuda")
        common = (hidden, weight, None, labels, None, None, None, scalar, -100)
        losses = torch.ops.fastvlp.soft_cross_entropy_losses(*common, kept, 9, 9, True, True)
        assert losses.shape == (9,) and losses.device.type == "cuda"
        d_hidden, d_weight, d_bias = torch.ops.fastvlp.soft_cross_entropy_gradients(
            *common, losses, kept, False, 9, 9, [True, True, False]
        )
        assert d_hidden.dtype == torch.bfloat16 and d_hidden.shape == (9, 8)
        assert d_weight.dtype == torch.float32 and d_weight.shape == (70, 8)
        assert d_bias.shape == (0,)
        early = torch.ops.fastvlp.soft_cross_entropy_losses_and_gradients(
            *common, 9, 9, [True, True, False]
        )
        assert all(t.dtype == torch.float32 and t.device.type == "cuda" for t in early)
        assert [tuple(t.shape) for t in early] == [(9,), (9, 8), (70, 8), (0,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_matmuls_on_a_gpu_fit_together(monkeypatch, dtype):
    # Their shapes and dtypes, without the GPU: the pass between them has tests of its own.
    passes = []

    def record(*arguments):
        passes.append(arguments)

    monkeypatch.setattr(register, "_pass", lambda logits: record)
    with torch._subclasses.fake_tensor.FakeTensorMode():

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, device="cuda", dtype=dtype)

        hidden, weight = empty(9, 8, dtype=dtype), empty(70, 8)
        labels = empty(9, dtype=torch.int64)
        common = (hidden, weight, empty(70), labels, hidden, weight, None, empty(), -100)
        plan = make_plan(9, 70, dtype, 4 << 10)
        kept = empty(plan.group_floats)
        losses = register._losses(*common, kept, plan.group_rows, plan.chunk_rows, True, False)
        gradients = register._gradients(
            *common, losses, kept, True, plan.group_rows, plan.chunk_rows, [True] * 3
        )
        assert sum(len(arguments[0]) for arguments in passes) >= 9
        early = register._losses_and_gradients(
            *common, plan.group_rows, plan.chunk_rows, [True] * 3
        )
    assert [g.dtype for g in early] == [torch.float32] * 4
    assert [tuple(g.shape) for g in early] == [(9,), (9, 8), (70, 8), (70,)]
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
    assert [tuple(g.shape) for g in gradients] == [(9, 8), (70, 8), (70,)]
    for logits, _, teacher, *_, gradient in passes:
        assert logits.dtype == teacher.dtype == torch.float32 and logits.shape == teacher.shape
        assert gradient.numel() == 0 or gradient.dtype == dtype
