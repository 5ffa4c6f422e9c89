"""What the contrastive losses refuse, and how torch sees their operators."""

import pytest
import torch
from fastvlp_tests.contrastive_cases import features

from fastvlp.ops import contrastive, explain, sigmoid_contrastive

LOSSES = [contrastive, sigmoid_contrastive]
X = torch.zeros(4, 8)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "args, error, message",
    [
        (([1.0], X, 1.0), TypeError, "image_features: expected a torch.Tensor, got list"),
        ((X.long(), X, 1.0), TypeError, "image_features: expected a floating-point dtype"),
        ((X[0], X, 1.0), ValueError, r"image_features: expected shape \[N, D\], got \(8,\)"),
        ((X, X[:3], 1.0), ValueError, r"text_features: .*\(4, 8\), got \(3, 8\)"),
        ((X, X[:, :5], 1.0), ValueError, r"text_features: .*\(4, 8\), got \(4, 5\)"),
        ((X[:, :0], X[:, :0], 1.0), ValueError, "image_features: expected a width of at least 1"),
        ((X, X.half(), 1.0), TypeError, "text_features: expected the dtype .*float32"),
        ((X, X.to("meta"), 1.0), ValueError, "text_features: expected the device"),
        ((X, X, float("nan")), ValueError, "logit_scale: expected a finite value, got nan"),
        ((X, X, torch.tensor(float("inf"))), ValueError, "logit_scale: expected a finite value"),
        ((X, X, 1e39), ValueError, "logit_scale: expected a finite value, got inf"),
        ((X, X, torch.ones(2)), ValueError, r"logit_scale: expected one value, got shape \(2,\)"),
        ((X, X, torch.ones((), dtype=torch.int)), TypeError, "logit_scale: .*floating-point"),
        ((X, X, "1"), TypeError, "logit_scale: expected a number or a tensor, got str"),
        ((X, X, 1.0, float("inf")), ValueError, "logit_bias: expected a finite value"),
    ],
)
def test_bad_arguments(loss, args, error, message):
    with pytest.raises(error, match=message):
        loss(*args)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("workspace", [0, -1, 1.5, "1GB"])
def test_bad_workspace(loss, workspace):
    with pytest.raises(ValueError, match="workspace_bytes: expected a positive number"):
        loss(X, X, 1.0, workspace_bytes=workspace)


def test_bad_direction():
    with pytest.raises(ValueError, match="direction: expected one of .*got 'up'"):
        contrastive(X, X, 1.0, direction="up")


@pytest.mark.parametrize("op", ["contrastive", "sigmoid_contrastive"])
def test_explain(monkeypatch, op):
    found = explain(op, X, X)
    assert found.chosen == "native"
    assert "CUDA" in found.reasons["triton"][0] and "native is preferred" in str(found)
    assert explain(op, X.double(), X.double()).chosen == "reference"
    monkeypatch.setenv("FASTVLP_BACKEND", "reference")
    assert explain(op, X, X).chosen == "reference"
    with pytest.raises(ValueError, match="op: expected one of .*contrastive.*got 'softmax'"):
        explain("softmax", X)


@pytest.mark.parametrize("loss", LOSSES)
def test_forced_backend(monkeypatch, loss):
    image, text = features(20, 8, torch.float32, "cpu")
    native = loss(image, text, 5.0)
    monkeypatch.setenv("FASTVLP_BACKEND", "reference")
    forced = loss(image.requires_grad_(), text, 5.0)
    assert type(forced.grad_fn).__name__ == "DivBackward0"
    torch.testing.assert_close(forced.detach(), native)
    monkeypatch.setenv("FASTVLP_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="(?s)no implementation can run.*not triton.*CUDA"):
        loss(image, text, 5.0)
    monkeypatch.setenv("FASTVLP_BACKEND", "gpu")
    with pytest.raises(ValueError, match="FASTVLP_BACKEND: expected one of .*'gpu'"):
        loss(image, text, 5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, dtype):
    ops = torch.ops.fastvlp
    x, y = features(70, 24, dtype, device)
    scale, bias = torch.tensor(5.0, device=device), torch.tensor(-2.0, device=device)
    kept = scale.new_zeros(3 * 32 * (64 + 16))
    statistics = (x, y, scale, kept, 0, True, True, 64, 32, 1)
    found = ops.contrastive_statistics(*statistics)
    weights = torch.tensor([0.01, 0.01], device=device)
    gradients = (x, y, scale, *found, weights, kept, 0, 64, 32, 1, 1, 2)
    sigmoid = (x, y, scale, bias, 0.1, 0, True, 64, 32, 1, 2)
    torch.library.opcheck(ops.contrastive_statistics, statistics)
    torch.library.opcheck(ops.contrastive_gradients, gradients)
    torch.library.opcheck(ops.contrastive_sigmoid, sigmoid)


@pytest.mark.parametrize("directions", [(True, True), (True, False), (False, True)])
def test_opcheck_of_the_loss_of_one_process(directions):
    ops = torch.ops.fastvlp
    x, y = features(70, 24, torch.float32, "cpu")
    scale, kept = torch.tensor(5.0), torch.zeros(3 * 32 * (64 + 16))
    loss = (x, y, scale, kept, *directions, 64, 32, 1)
    _, statistics = ops.contrastive_loss(*loss)
    gradients = (x, y, scale, statistics, torch.tensor(0.3), kept, *directions, 64, 32, 1, 1, 2)
    torch.library.opcheck(ops.contrastive_loss, loss)
    torch.library.opcheck(ops.contrastive_loss_gradients, gradients)


def test_the_loss_of_one_process_refuses_what_makes_no_pairs():
    x, y = features(70, 24, torch.float32, "cpu")
    call, kept = torch.ops.fastvlp.contrastive_loss, torch.empty(0)
    with pytest.raises(RuntimeError, match="same number of rows"):
        call(x, y[:60], torch.tensor(5.0), kept, True, True, 64, 32, 0)
    with pytest.raises(RuntimeError, match="same number of rows, at least one"):
        call(x[:0], y[:0], torch.tensor(5.0), kept, True, True, 64, 32, 0)
    with pytest.raises(RuntimeError, match="a direction that has a loss"):
        call(x, y, torch.tensor(5.0), kept, False, False, 64, 32, 0)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_number_beyond_float64_is_refused(loss):
    image, text = features(4, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match="logit_scale: expected a number in float64's range"):
        loss(image, text, 10**400)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_no_process_group_is_refused(loss):
    image, text = features(4, 8, torch.float32, "cpu")
    with pytest.raises(TypeError, match="group: expected a process group .*got -100"):
        loss(image, text, 5.0, group=-100)  # what new_group gives a rank outside of the group


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(device, loss, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: loss(*a) * 2, fullgraph=True, dynamic=dynamic,
                             backend="aot_eager")  # fmt: skip
    for n in (96, 130):
        image, text = features(n, 24, torch.float32, device)
        scale = torch.tensor(10.0, device=device)
        results = []
        for function in (compiled, lambda *a: loss(*a) * 2):
            leaves = [t.clone().requires_grad_() for t in (image, text, scale)]
            value = function(*leaves)
            value.backward()
            results.append([value.detach()] + [leaf.grad for leaf in leaves])
        for ours, eager in zip(*results, strict=True):
            assert torch.equal(ours, eager)


def test_fake_tensors_on_a_device_that_is_not_here():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        x = torch.empty(100, 32, device="cuda", dtype=torch.bfloat16)
        scale = torch.empty((), device="cuda")
        row_lse, col_lse, positive = torch.ops.fastvlp.contrastive_statistics(
            x, x, scale, scale.new_empty(0), 0, True, False, 64, 64, 0
        )
        assert row_lse.shape == positive.shape == (100,) and col_lse.shape == (0,)
        assert row_lse.device.type == positive.device.type == "cuda"
