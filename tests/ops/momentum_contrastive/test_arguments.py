"""What momentum_contrastive refuses, and how torch sees its operator."""

import pytest
import torch
from fastvlp_tests.momentum_cases import draw

from fastvlp.ops import explain, momentum_contrastive
from fastvlp.ops.momentum_contrastive.checks import CANDIDATES

X, QUEUE = torch.zeros(4, 8), torch.zeros(6, 8)
IDS, QUEUE_IDS = torch.zeros(4, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)


def call(temperature=0.1, alpha=0.4, **kwargs):
    names = ("image_features", "text_features", "image_momentum", "text_momentum",
             "image_queue", "text_queue")  # fmt: skip
    features = [kwargs.pop(name, QUEUE if "queue" in name else X) for name in names]
    return momentum_contrastive(*features, temperature, alpha, **kwargs)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"image_features": X.long()}, TypeError, "image_features: expected a floating-point"),
        ({"text_features": X[:3]}, ValueError, r"text_features: .*\(4, 8\), got \(3, 8\)"),
        ({"image_momentum": None}, TypeError, "image_momentum: expected a torch.Tensor"),
        ({"text_momentum": X[:3]}, ValueError, r"text_momentum: expected shape \[4, 8\]"),
        ({"image_queue": QUEUE[:, :5]}, ValueError, r"image_queue: expected shape \[Q, 8\]"),
        ({"text_queue": QUEUE[:5]}, ValueError, r"text_queue: .*\(6, 8\), got \(5, 8\)"),
        ({"text_queue": QUEUE.bfloat16()}, TypeError, "text_queue: expected the dtype .*float32"),
        ({"image_queue": QUEUE.to("meta")}, ValueError, "image_queue: expected the device"),
        ({"image_momentum": torch.zeros(4, 8, requires_grad=True)}, ValueError,
         "image_momentum: .*no gradient.*detach"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a value above 0, got 0.0"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a value above 0"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a finite value"),
        ({"temperature": 1e-37}, ValueError, "temperature: expected 1e-36 to 1e.36, .*e-38"),
        ({"temperature": 1e37}, ValueError, "temperature: expected 1e-36 to 1e.36, .*got 9.9"),
        ({"alpha": 1.5}, ValueError, "alpha: expected a value from 0 to 1, got 1.5"),
        ({"alpha": torch.tensor(1.5)}, ValueError, "alpha: .*from 0 to 1, got 1.5"),
        ({"alpha": torch.tensor(-0.25)}, ValueError, "alpha: .*from 0 to 1, got -0.25"),
        ({"alpha": torch.tensor(float("nan"))}, ValueError, "alpha: .*finite value, got nan"),
        ({"alpha": torch.zeros(2)}, ValueError, "alpha: expected one value"),
        ({"alpha": torch.zeros((), requires_grad=True)}, ValueError, "alpha: .*no gradient"),
        ({"queue_ids": QUEUE_IDS}, ValueError, "queue_ids: given without ids"),
        ({"ids": IDS}, ValueError, "queue_ids: expected one id per queue row"),
        ({"ids": IDS.int(), "queue_ids": QUEUE_IDS}, TypeError, "ids: expected torch.int64"),
        ({"ids": IDS, "queue_ids": IDS}, ValueError, r"queue_ids: expected shape \[6\]"),
        ({"ids": [0] * 4, "queue_ids": QUEUE_IDS}, TypeError, "ids: expected a torch.Tensor"),
        ({"queue_length": 7}, ValueError, "queue_length: expected 0 to the queue's 6 rows, got 7"),
        ({"queue_length": 1.0}, TypeError, "queue_length: expected a whole number"),
        ({"queue_length": torch.ones(())}, TypeError, "queue_length: expected one int64 value"),
        ({"seed": 2**63}, ValueError, "seed: expected a number of 64 bits"),
        ({"seed": "x"}, TypeError, "seed: expected a whole number, got str"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        call(**arguments)


def test_explain(monkeypatch):
    found = explain("momentum_contrastive", X, X)
    assert found.chosen == "native" and "CUDA" in found.reasons["triton"][0]
    assert explain("momentum_contrastive", X.double(), X.double()).chosen == "reference"
    with torch._subclasses.fake_tensor.FakeTensorMode():
        there = torch.empty(4, 8, device="cuda")
        assert "CPU" in CANDIDATES["native"](there, there)[0]
    monkeypatch.setenv("FASTVLP_BACKEND", "reference")
    assert call().loss.isfinite()
    monkeypatch.setenv("FASTVLP_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="(?s)no implementation can run.*not triton.*CUDA"):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients, negatives", [(True, True), (False, False)])
def test_opcheck(device, dtype, gradients, negatives):
    arguments = draw(9, 40, 24, dtype, device, kinds=6).arguments()
    torch.library.opcheck(
        torch.ops.fastvlp.momentum_contrastive,
        (*arguments, True, gradients, negatives, 32, 32),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(device, dynamic):
    torch.compiler.reset()

    def loss(image, text, temperature, alpha, *rest):
        result = momentum_contrastive(image, text, *rest, temperature, alpha, seed=3)
        return result.loss * 2, *result[1:]

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, queue in ((20, 100), (33, 130)):
        step = draw(batch, queue, 24, torch.float32, device)
        scalars = torch.tensor(0.1, device=device), torch.tensor(0.3, device=device)
        results = []
        for function in (compiled, loss):
            leaves = [t.clone().requires_grad_() for t in (*step.features[:2], scalars[0])]
            value, *negatives = function(*leaves, scalars[1], *step.features[2:])
            value.backward()
            results.append([value.detach(), *negatives] + [leaf.grad for leaf in leaves])
        for ours, eager in zip(*results, strict=True):
            assert torch.equal(ours, eager)


def test_fake_tensors_on_a_device_that_is_not_here():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        x = torch.empty(10, 32, device="cuda", dtype=torch.bfloat16)
        queue = torch.empty(100, 32, device="cuda", dtype=torch.bfloat16)
        scalar = torch.empty((), device="cuda")
        number = torch.empty((), device="cuda", dtype=torch.int64)
        none = torch.empty(0, device="cuda", dtype=torch.int64)
        loss, image, text, _, texts, images = torch.ops.fastvlp.momentum_contrastive(
            x, x, x, x, queue, queue, none, none, number, scalar, scalar, number,
            True, True, True, 32, 32,
        )  # fmt: skip
        assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.shape == ()
        assert image.shape == text.shape == (10, 32) and image.dtype == torch.bfloat16
        assert texts.shape == images.shape == (10,) and images.dtype == torch.int64
