"""The loss modules against open_clip's and transformers' own."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from fastvlp_tests.contrastive_cases import features, run
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPConfig, CLIPModel

from fastvlp import losses, ops

# With the tests' requirements it is always there; bench/gpu_check.py runs where it is not.
open_clip_loss = pytest.importorskip("open_clip.loss")
PAIRS = [(losses.ClipLoss, open_clip_loss.ClipLoss), (losses.SigLipLoss, open_clip_loss.SigLipLoss)]


@pytest.mark.parametrize("ours, peer", PAIRS)
def test_same_arguments(ours, peer):
    def positional(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    # open_clip's SigLipLoss has chunk_size since 4.
    extra = [("chunk_size", 0)] if ours is losses.SigLipLoss else []
    assert positional(ours) in (positional(peer), positional(peer) + extra)
    names = [name for name, _ in positional(ours.forward)]
    assert names == [name for name, _ in positional(peer.forward)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ours, peer", PAIRS)
def test_same_value_and_gradients(device, ours, peer, dtype):
    image, text = features(200, 48, dtype, device)
    arguments = (14.3, -5.0)
    mine = run(ours(), image, text, *arguments)
    theirs = run(peer(), image, text, *arguments)
    exact = run(peer(), image, text, *arguments, dtype=torch.float64)
    for name in ("loss", "image", "text", "scale"):
        wanted = getattr(exact, name)
        kind = torch.float32 if name in ("loss", "scale") else dtype
        floor = 4 * epsilon(kind) * max(wanted.norm().item(), 1e-2)
        assert_as_accurate(name, getattr(mine, name), getattr(theirs, name), wanted, floor)
    torch.testing.assert_close(mine.bias, exact.bias.float(), atol=2e-6, rtol=2e-2)


def test_negatives_of_no_images_lose_nothing():
    none, texts = torch.ones(0, 4, requires_grad=True), torch.ones(3, 4)
    loss = losses.SigLipLoss()._loss(none, texts, 1.0, 0.0, negative_only=True)
    assert loss.item() == 0.0


@pytest.mark.parametrize("loss", [losses.ClipLoss, losses.SigLipLoss])
def test_the_group_may_be_assigned(loss):
    late = loss(rank=1, world_size=4)
    late.group = None
    assert late.group is None
    assert late(*features(4, 8, torch.float32, "cpu"), 2.0).isfinite()
    with pytest.raises(TypeError, match="group: expected a process group"):
        late.group = "world"


def test_clip_loss_of_transformers():
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    config = CLIPConfig(
        text_config=small | {"vocab_size": 50, "eos_token_id": 49},
        vision_config=small | {"image_size": 32, "patch_size": 16},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    tokens = torch.randint(0, 49, (6, 7))
    tokens[:, -1] = 49
    out = model(input_ids=tokens, pixel_values=torch.randn(6, 3, 32, 32), return_loss=True)
    scale = model.logit_scale.exp()
    mine = losses.ClipLoss()(out.image_embeds, out.text_embeds, scale)
    assert mine.item() == pytest.approx(out.loss.item(), rel=1e-6)


@pytest.mark.parametrize("ours, peer", PAIRS)
def test_output_dict(ours, peer):
    image, text = features(8, 4, torch.float32, "cpu")
    mine = ours()(image, text, 2.0, -1.0, output_dict=True)
    theirs = peer()(image, text, torch.tensor(2.0), torch.tensor(-1.0), output_dict=True)
    assert mine.keys() == theirs.keys()
    torch.testing.assert_close(mine["contrastive_loss"], theirs["contrastive_loss"])


@pytest.mark.parametrize("loss", [losses.ClipLoss(), losses.SigLipLoss()])
def test_autocast_casts_the_features(loss):
    image, text = features(40, 16, torch.float32, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(image.requires_grad_(), text, 10.0)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss(image.bfloat16(), text.bfloat16(), 10.0))
    inside.backward()
    assert image.grad.dtype == torch.float32


def test_arguments_that_change_nothing_are_accepted():
    image, text = features(8, 4, torch.float32, "cpu")
    plain = losses.ClipLoss()(image, text, 2.0)
    same = losses.ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True)
    assert torch.equal(plain, same(image, text, 2.0))
    for dist_impl in (None, "bidir", "shift", "reduce", "gather"):
        losses.SigLipLoss(cache_labels=True, dist_impl=dist_impl)


def test_arguments_that_would_be_wrong_are_refused():
    for loss in (losses.ClipLoss, losses.SigLipLoss):
        early = loss(rank=1, world_size=4)  # as trainers do before init_process_group
        with pytest.raises(ValueError, match="world_size: got 4.*init_process_group"):
            early(*features(4, 8, torch.float32, "cpu"), 2.0)
        with pytest.raises(ValueError, match="rank: expected 0"):
            loss(rank=1)
    with pytest.raises(ValueError, match="use_horovod"):
        losses.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="dist_impl: expected .*got 'tree'"):
        losses.SigLipLoss(dist_impl="tree")
    with pytest.raises(ValueError, match="chunk_size: expected at least 0, got -1"):
        losses.SigLipLoss(chunk_size=-1)


def test_modules_hold_no_parameters_and_no_matrix():
    image, text = features(600, 8, torch.float32, "cpu")
    loss = losses.ClipLoss(workspace_bytes=1)
    value = loss(image.requires_grad_(), text, 10.0)
    saved = sum(t.numel() for t in value.grad_fn.saved_tensors)
    assert not list(loss.parameters()) and not list(loss.buffers())
    assert saved < 2 * 600 * 8 + 4 * 600


def distilling(base):
    """open_clip's DistillClipLoss, derived from this class in place of its own ClipLoss."""
    own = vars(open_clip_loss.DistillClipLoss)
    return type("Distilling", (base,), {name: own[name] for name in ("dist_loss", "forward")})


def pairwise(base):
    """A subclass of SigLipLoss that adds texts without an image, by open_clip's own methods."""

    class MoreTexts(base):
        def forward(self, image, text, scale, more):
            loss = self._loss(image, text, scale, -5.0)
            logits = self.get_logits(image, text, scale, -5.0)
            labels = self.get_ground_truth(image.device, image.dtype, len(image))
            other = -F.logsigmoid(labels * logits).sum() / len(image)
            return loss + other + self._loss(image, more, scale, -5.0, negative_only=True)

    return MoreTexts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["ClipLoss", "SigLipLoss"])
def test_subclasses_that_use_the_methods_of_open_clip(kind, dtype):
    image, text = features(40, 24, torch.float32, "cpu")
    more, others = features(40, 24, torch.float32, "cpu", seed=1)
    scale = torch.tensor(7.0)
    bases = [getattr(module, kind) for module in (losses, open_clip_loss)]
    if kind == "ClipLoss":
        modules = [distilling(base)() for base in bases]
        arguments = (image, text, scale, more, others, scale)
    else:
        modules = [pairwise(base)() for base in bases]
        modules[0].chunk_size = 16
        arguments = (image, text, scale, more)
    results = []
    for module, to in zip([*modules, modules[1]], [dtype, dtype, torch.float64], strict=True):
        leaves = [t.to(to, copy=True).requires_grad_() for t in arguments]
        value = module(*leaves)
        value = sum(value) if isinstance(value, tuple) else value
        results.append([value, *torch.autograd.grad(value, leaves)])
    for ours, theirs, exact in zip(*results, strict=True):
        floor = 4 * epsilon(dtype) * max(1.0, exact.norm().item())
        assert_as_accurate(kind, ours, theirs, exact, floor)


def test_a_method_that_forward_would_pass_over_is_refused():
    class Scaled(losses.ClipLoss):
        def get_logits(self, *arguments):
            return super().get_logits(*arguments)

    with pytest.raises(TypeError, match="Scaled.get_logits: forward of ClipLoss computes the loss"):
        Scaled()
    Derived = pairwise(losses.SigLipLoss)
    assert Derived(chunk_size=4).chunk_size == 4


@pytest.mark.parametrize("loss", [losses.ClipLoss(), losses.SigLipLoss()])
def test_what_is_no_tensor_is_named(loss):
    image, text = features(4, 8, torch.float32, "cpu")
    with pytest.raises(TypeError, match="image_features: expected a torch.Tensor, got NoneType"):
        loss(None, text, 2.0)
    with pytest.raises(TypeError, match="text_features: expected a torch.Tensor, got list"):
        loss(image, [1.0], 2.0)


MOMENTA = torch.randn(6, 24, generator=torch.Generator().manual_seed(5))
TRANSFORMED = {
    "ClipLoss": lambda x, y, s: losses.ClipLoss()(x, y, s),
    "SigLipLoss": lambda x, y, s: losses.SigLipLoss()(x, y, s, -s),
    "momentum_contrastive": lambda x, y, s: (
        ops.momentum_contrastive(
            x, y, y.detach(), x.detach(), MOMENTA, MOMENTA, temperature=1 / s, alpha=0.4, seed=1
        ).loss
    ),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_gradients_by_torch_func(name):
    loss = TRANSFORMED[name]
    inputs = (*features(20, 24, torch.float32, "cpu"), torch.tensor(5.0))
    leaves = [t.clone().requires_grad_() for t in inputs]
    value = loss(*leaves)
    expected = torch.autograd.grad(value, leaves)
    found, again = torch.func.grad_and_value(loss, argnums=(0, 1, 2))(*inputs)
    assert torch.equal(again, value)
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours, wanted)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x, *inputs[1:]).sum())(inputs[0])


class Zeros(TorchDispatchMode):
    """The sizes of all zeros made inside."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        if "zero" in str(function):
            self.sizes.append(made.numel())
        return made


@pytest.mark.parametrize("name", TRANSFORMED)
def test_backward_makes_no_zeros_for_what_has_no_gradient(name):
    inputs = (*features(20, 24, torch.float32, "cpu"), torch.tensor(5.0))
    value = TRANSFORMED[name](*(t.clone().requires_grad_() for t in inputs))
    with Zeros() as zeros:
        value.backward()
    assert all(size <= 20 for size in zeros.sizes)
