"""contrastive against its float64 reference, over everything a trainer may pass."""

import math

import pytest
import torch
from fastvlp_tests import instruction_sets
from fastvlp_tests.contrastive_cases import features, run
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from hypothesis import given
from hypothesis import strategies as st

from fastvlp.ops import contrastive, contrastive_reference, release_workspace
from fastvlp.ops._core import workspace
from fastvlp.ops.contrastive.plan import make_plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(image, text, scale, bias=0.0, upstream=1.0, **kwargs):
    reference_kwargs = {k: v for k, v in kwargs.items() if k == "direction"}
    ours = run(contrastive, image, text, scale, bias, upstream=upstream, **kwargs)
    eager = run(contrastive_reference, image, text, scale, bias, upstream=upstream,
                **reference_kwargs)  # fmt: skip
    exact = run(contrastive_reference, image, text, scale, bias, torch.float64, upstream,
                **reference_kwargs)  # fmt: skip
    n, dtype = len(image), image.dtype
    logits = scale * image.double() @ text.double().T + bias
    rounding = epsilon(torch.float32) * (logits.abs().max().item() + math.log(n))
    assert ours.loss.dtype == torch.float32 and ours.loss.shape == ()
    assert_as_accurate("loss", ours.loss, eager.loss, exact.loss, floor=rounding)
    # A gradient of a saturated softmax is a difference of numbers near 1/N: that is the scale of
    # the rounding of its elements, times the rounding of the logit inside the exponential.
    share = upstream * scale / n * (rounding + epsilon(torch.float32))
    for name, other in (("image", text), ("text", image)):
        wanted = getattr(exact, name)
        floor = share * other.double().norm().item() + epsilon(dtype) * wanted.norm().item()
        got = getattr(ours, name)
        assert got.dtype == dtype
        assert_as_accurate(name, got, getattr(eager, name), wanted, floor)
    floor = share * image.double().norm().item() * text.double().norm().item()
    if dtype != torch.float32:  # its terms are products with logit gradients of this dtype
        floor += epsilon(dtype) * (exact.image * image.double()).abs().sum().item() / scale
    assert_as_accurate("scale", ours.scale, eager.scale, exact.scale, floor)
    assert ours.bias == 0  # the softmax does not see a constant
    return ours


@given(
    n=st.sampled_from([1, 2, 3, 31, 32, 33, 64, 97]),
    dim=st.sampled_from([1, 2, 7, 16, 33, 64, 129]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 14.3, 100.0]),
    norm=st.sampled_from([1.0, 0.05, None]),
    direction=st.sampled_from(["both", "image_to_text", "text_to_image"]),
    workspace=st.sampled_from([1, 40_000, 1 << 28]),
    strided=st.booleans(),
    seed=st.integers(0, 5),
)
def test_matches_float64(device, n, dim, dtype, scale, norm, direction, workspace, strided, seed):
    image, text = features(n, dim, dtype, device, norm=norm, strided=strided, seed=seed)
    check(image, text, scale, 0.5, 0.7, direction=direction, workspace_bytes=workspace)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, dim", [(1100, 65), (700, 600), (1537, 32)])
@pytest.mark.parametrize("workspace", [1, 4 << 20, 1 << 28])
def test_several_blocks(device, dtype, n, dim, workspace):
    image, text = features(n, dim, dtype, device)
    check(image, text, 20.0, workspace_bytes=workspace)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def test_every_instruction_set(monkeypatch, dtype, isa):
    instruction_sets.force(monkeypatch, isa)
    for n, dim in ((1, 1), (130, 67), (600, 520)):
        image, text = features(n, dim, dtype, "cpu")
        check(image, text, 30.0, workspace_bytes=3 << 20)


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("FASTVLP_CPU_ISA", "mmx")
    image, text = features(4, 8, torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="FASTVLP_CPU_ISA.*portable.*mmx"):
        contrastive(image, text, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(device, dtype):
    # Logits of +-1e4: every softmax is one-hot, and a shift common to all rows would underflow.
    image, text = features(80, 48, dtype, device, norm=10.0)
    check(image, text, 100.0)


def test_rows_far_below_the_scale(device):
    # Every similarity of row 0 is negative: exp(z - s) alone would be a sum of zeros.
    image, text = features(64, 32, torch.float32, device)
    image[0] = -torch.nn.functional.normalize(text.sum(0), dim=0)
    ours = check(image, text, 100.0)
    assert ours.image[0].norm() > 0


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_wide_features_round_no_worse_than_eager(device, scale):
    # Sums over K of 512 are where a product's own rounding shows: no floor here.
    image, text = features(1024, 512, torch.float32, device)
    ours = run(contrastive, image, text, scale, 0.0)
    eager = run(contrastive_reference, image, text, scale, 0.0)
    exact = run(contrastive_reference, image, text, scale, 0.0, torch.float64)
    for name in ("image", "text"):
        assert_as_accurate(name, getattr(ours, name), getattr(eager, name), getattr(exact, name))


def test_nan_reaches_the_loss_and_inf_does_not_hide(device):
    for value in (float("nan"), float("inf")):
        image, text = features(40, 16, torch.float32, device)
        image[3, 5] = value
        assert contrastive(image, text, 10.0).isnan()


def test_bitwise_deterministic(device):
    for dtype in DTYPES:
        image, text = features(700, 64, dtype, device)
        first = run(contrastive, image, text, 20.0, 0.0, workspace_bytes=1 << 20)
        second = run(contrastive, image, text, 20.0, 0.0, workspace_bytes=1 << 20)
        for name in ("loss", "image", "text", "scale"):
            assert torch.equal(getattr(first, name), getattr(second, name)), (dtype, name)


def test_kept_and_recomputed_logits_give_the_same_gradients(device):
    image, text = features(1200, 64, torch.float32, device)
    kept = run(contrastive, image, text, 20.0, 0.0, workspace_bytes=1 << 28)
    part = run(contrastive, image, text, 20.0, 0.0, workspace_bytes=7 << 20)
    for name in ("image", "text"):
        torch.testing.assert_close(getattr(kept, name), getattr(part, name), rtol=1e-5, atol=1e-9)


def test_backward_twice_with_retained_graph(device):
    # The second pass computes the logits again: the kept ones went back with the first.
    image, text = features(1200, 16, torch.float32, device)
    image.requires_grad_()
    loss = contrastive(image, text, 10.0)
    (first,) = torch.autograd.grad(loss, image, retain_graph=True)
    contrastive(image, text, 3.0).backward()
    (second,) = torch.autograd.grad(loss, image)
    rounding = 8 * epsilon(torch.float32)
    torch.testing.assert_close(first, second, rtol=rounding, atol=rounding * first.abs().max())


def test_two_losses_between_forward_and_backward(device):
    image, text = features(700, 16, torch.float32, device)
    alone = [run(contrastive, image, text, scale, 0.0).image for scale in (5.0, 20.0)]
    leaves = [image.clone().requires_grad_() for _ in alone]
    losses = [contrastive(x, text, s) for x, s in zip(leaves, (5.0, 20.0), strict=True)]
    sum(losses).backward()
    for leaf, expected in zip(leaves, alone, strict=True):
        assert torch.equal(leaf.grad, expected)


def test_the_workspace_is_reused_and_released():
    image, text = features(600, 16, torch.float32, "cpu")  # on a GPU no logits are kept
    release_workspace()
    assert not workspace._free
    for _ in range(2):
        run(contrastive, image, text, 5.0, 0.0)
        (buffer,) = workspace._free
        address = buffer.data_ptr()
    run(contrastive, image[:100], text[:100], 5.0, 0.0)
    assert [b.data_ptr() for b in workspace._free] == [address]
    loss = contrastive(image.requires_grad_(), text, 5.0)
    assert not workspace._free
    del loss  # a forward pass without a backward gives its buffer back as well
    assert [b.data_ptr() for b in workspace._free] == [address]
    release_workspace()
    assert not workspace._free


def test_gradient_only_where_asked(device):
    image, text = features(50, 16, torch.float32, device)
    text.requires_grad_()
    contrastive(image, text, 10.0).backward()
    assert image.grad is None and text.grad is not None
    assert not contrastive(image, text.detach(), 10.0).requires_grad


def test_transposed_features_are_copied_not_misread(device):
    image, text = features(40, 24, torch.float32, device)
    check(image.T.contiguous().T, text, 10.0)


def test_float64_runs_the_reference_and_passes_gradcheck(device):
    image, text = features(5, 4, torch.float64, device)
    scale = torch.tensor(3.0, dtype=torch.float64, device=device, requires_grad=True)
    inputs = (image.requires_grad_(), text.requires_grad_(), scale)
    assert torch.autograd.gradcheck(contrastive, inputs)


def test_reference_by_hand():
    image = torch.eye(2, dtype=torch.float64)
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    # Logits [[2, 2], [0, 0]]: each row is a coin toss; columns are 2 against 0.
    rows = math.log(2)
    cols = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2
    assert contrastive_reference(image, text, 2.0, direction="image_to_text").item() == (
        pytest.approx(rows)
    )
    assert contrastive_reference(image, text, 2.0, direction="text_to_image").item() == (
        pytest.approx(cols)
    )
    assert contrastive_reference(image, text, 2.0, 7.0).item() == pytest.approx((rows + cols) / 2)


def test_second_derivative_is_refused(device):
    image, text = features(8, 4, torch.float32, device)
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(contrastive(image, text, 5.0), image, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative.*contrastive_reference"):
        gradient.sum().backward()


@given(
    rows=st.integers(1, 100_000),
    cols=st.integers(1, 100_000),
    dim=st.sampled_from([1, 512, 1280]),
    dtype=st.sampled_from(DTYPES),
    workspace=st.integers(1, 1 << 30),
)
def test_plan_stays_within_its_budget(rows, cols, dim, dtype, workspace):
    plan = make_plan(rows, cols, dim, dtype, workspace, keep=True)
    row_blocks, col_blocks = -(-rows // plan.block_rows), -(-cols // plan.block_cols)
    tile = 4 * plan.block_cols * (plan.block_rows + 16)
    assert 1 <= plan.chunk_rows <= row_blocks and 1 <= plan.chunk_cols <= col_blocks
    assert 0 <= plan.keep_blocks <= row_blocks
    used = plan.keep_blocks * col_blocks * tile
    if plan.keep_blocks < row_blocks:
        used += plan.chunk_rows * plan.chunk_cols * tile
        if dtype != torch.float32 and used > tile:
            used += 4 * dim * (rows + cols)
    assert used <= max(workspace, tile)
