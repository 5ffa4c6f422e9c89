"""What the word-patch alignment refuses, and how torch sees its operators."""

import pytest
import torch
from fastvlp_tests.alignment_cases import pairs, run

from fastvlp.ops import (
    alignment_padding,
    explain,
    word_patch_alignment,
    word_patch_alignment_loss,
    word_patch_alignment_reference,
)
from fastvlp.ops.word_patch_alignment.checks import SMALLEST_BETA

X, Y = torch.zeros(2, 4, 8), torch.zeros(2, 6, 8)
XP, YP = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    "args, error, message",
    [
        (([1.0], Y, XP, YP), TypeError, "text_features: expected a torch.Tensor, got list"),
        ((X, Y.long(), XP, YP), TypeError, "image_features: expected a floating-point dtype"),
        ((X[0], Y, XP, YP), ValueError, r"text_features: expected shape \[B, L, D\].*\(4, 8\)"),
        ((X[..., :0], Y, XP, YP), ValueError, "text_features: .*D of at least 1"),
        ((X, Y[:1], XP, YP), ValueError, r"image_features: expected the number of pairs"),
        ((X, Y[..., :5], XP, YP), ValueError, r"image_features: .*\(2, 4, 8\), got \(2, 6, 5\)"),
        ((X, Y.half(), XP, YP), TypeError, "image_features: expected the dtype .*float32"),
        ((X, Y.to("meta"), XP, YP), ValueError, "image_features: expected the device"),
        ((X, Y, XP.int(), YP), TypeError, "text_padding: expected a bool tensor.*int32"),
        ((X, Y, XP, None), TypeError, "image_padding: expected a bool tensor.*NoneType"),
        ((X, Y, XP, XP), ValueError, r"image_padding: .*\(2, 6\), got \(2, 4\)"),
        ((X, Y, XP.to("meta"), YP), ValueError, "text_padding: expected the features' device"),
    ],
)
def test_bad_arguments(args, error, message):
    with pytest.raises(error, match=message):
        word_patch_alignment(*args)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"beta": 0.0}, ValueError, "beta: expected a finite number of at least 0.04.*got 0.0"),
        ({"beta": 0.01}, ValueError, "beta: .*range of float32"),
        ({"beta": float("nan")}, ValueError, "beta: expected a finite number"),
        ({"beta": "1"}, TypeError, "beta: expected a number, got str"),
        ({"iterations": 0}, ValueError, "iterations: expected a whole number of at least 1, got 0"),
        ({"iterations": 2.0}, ValueError, "iterations: expected a whole number"),
        ({"inner_iterations": True}, ValueError, "inner_iterations: expected a whole number"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        word_patch_alignment(X, Y, XP, YP, **settings)


def test_a_small_beta_is_for_float64():
    assert word_patch_alignment(X.double(), Y.double(), XP, YP, beta=0.01).isfinite().all()
    for beta in (1e-3, 1e-9, 1e-300):
        with pytest.raises(ValueError, match="beta: .*0.005.*range of float64"):
            word_patch_alignment(X.double(), Y.double(), XP, YP, beta=beta)


def test_the_smallest_betas_give_the_plan_of_the_definition():
    # Two words and two patches that match crosswise: all mass goes to the matches.
    text, nothing = torch.eye(2, 8)[None], torch.zeros(1, 2, dtype=torch.bool)
    for dtype, beta in SMALLEST_BETA.items():
        distance, plan = word_patch_alignment(
            text.to(dtype), -text.flip(1).to(dtype), nothing, nothing, beta=beta, return_plan=True
        )
        assert torch.equal(plan, torch.eye(2, dtype=dtype)[None] / 2)
        assert distance.item() == 1


def test_bad_loss_arguments():
    distance = torch.ones(3)
    with pytest.raises(TypeError, match="is_positive: expected a bool tensor, got torch.int64"):
        word_patch_alignment_loss(distance, torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"is_positive: .*got \(2,\) for distances \(3,\)"):
        word_patch_alignment_loss(distance, torch.ones(2, dtype=torch.bool))


def test_bad_lengths():
    lengths = torch.tensor([2, 3])
    with pytest.raises(TypeError, match="text_lengths: expected whole numbers"):
        alignment_padding(lengths.float(), lengths, 4, 4)
    with pytest.raises(ValueError, match="image_lengths: expected 1 dimensions"):
        alignment_padding(lengths, lengths[None], 4, 4)


def test_explain(monkeypatch):
    op = "word_patch_alignment"
    found = explain(op, X, Y, XP, YP, beta=0.5)
    assert found.chosen == "native"
    assert "CUDA" in found.reasons["triton"][0] and "native is preferred" in str(found)
    assert explain(op, X.double(), Y.double()).chosen == "reference"
    monkeypatch.setenv("FASTVLP_BACKEND", "reference")
    assert explain(op, X, Y).chosen == "reference"


def test_explain_says_what_triton_cannot_hold():
    from fastvlp.kernels import alignment_supported

    assert "more than the 16384 elements" in str(
        alignment_supported(torch.zeros(1, 65, 8), torch.zeros(1, 200, 8))
    )
    assert "float64" in str(alignment_supported(X.double(), Y.double()))


def test_forced_backend(monkeypatch):
    case = pairs(2, 4, 6, 8, torch.float32)
    native = run(word_patch_alignment, case)
    monkeypatch.setenv("FASTVLP_BACKEND", "reference")
    forced, expected = run(word_patch_alignment, case), run(word_patch_alignment_reference, case)
    assert torch.equal(forced.plan, expected.plan)
    torch.testing.assert_close(forced.distance, native.distance)
    monkeypatch.setenv("FASTVLP_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="(?s)no implementation can run.*not triton.*CUDA"):
        word_patch_alignment(X, Y, XP, YP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, dtype):
    ops = torch.ops.fastvlp
    case = pairs(3, 5, 18, 24, dtype, device)
    forward = (case.text, case.image, *case.masks(), 0.5, 20, 1)
    _, plan, x_rows, y_rows = ops.word_patch_alignment(*forward)
    backward = (case.upstream, case.text, case.image, plan, x_rows, y_rows)
    torch.library.opcheck(ops.word_patch_alignment, forward)
    torch.library.opcheck(ops.word_patch_alignment_gradients, backward)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(device, dynamic):
    torch.compiler.reset()

    def loss(text, image, text_padding, image_padding, is_positive):
        distance = word_patch_alignment(text, image, text_padding, image_padding)
        return word_patch_alignment_loss(distance, is_positive)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for words, patches in ((6, 18), (9, 25)):
        case = pairs(4, words, patches, 16, torch.float32, device)
        results = []
        for function in (compiled, loss):
            leaves = [t.clone().requires_grad_() for t in (case.text, case.image)]
            value = function(*leaves, *case.masks(), case.upstream > 0)
            value.backward()
            results.append([value.detach()] + [leaf.grad for leaf in leaves])
        for ours, eager in zip(*results, strict=True):
            assert torch.equal(ours, eager)


def test_fake_tensors_on_a_device_that_is_not_here():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        x = torch.empty(3, 7, 32, device="cuda", dtype=torch.bfloat16)
        y = torch.empty(3, 20, 32, device="cuda", dtype=torch.bfloat16)
        masks = (torch.empty(3, n, dtype=torch.bool, device="cuda") for n in (7, 20))
        found = torch.ops.fastvlp.word_patch_alignment(x, y, *masks, 0.5, 50, 1)
        assert [t.shape for t in found] == [(3,), (3, 7, 20), (2, 3, 7), (2, 3, 20)]
        assert all(t.dtype == torch.float32 and t.device.type == "cuda" for t in found)
