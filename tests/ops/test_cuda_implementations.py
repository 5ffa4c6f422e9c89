"""What holds inside of every implementation for CUDA tensors, seen without a GPU."""

import contextlib

import pytest
import torch
from fastvlp_tests import fake_cuda
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from fastvlp import FeatureQueue, losses, nn
from fastvlp.masking import MaskingVocabulary, mask_tokens, sample_keys
from fastvlp.nn.feed_forward import Norm, feed_forward
from fastvlp.ops import compiled

# Compiled: elementwise passes of our own, without a matmul that autocast could change.
COMPILED = {
    "contrastive_cuda_statistics", "contrastive_cuda_gradient", "contrastive_cuda_sigmoid",
    "ema_update", "adamw_ema", "last_exceeding",
}  # fmt: skip
# Calls that look at their tensors' values, which fake ones do not have.
LOOKING = {"attention_without_bounds"}
CALLS = [(name, "") for name in fake_cuda.CALLS if name not in LOOKING] + [
    (name, "native") for name in ("contrastive", "sigmoid")
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(monkeypatch, name, backend, dtype) -> fake_cuda.Implementations:
    """The call of this name, forward and backward."""
    monkeypatch.setenv("FASTVLP_BACKEND", backend)
    with fake_cuda.gpu(), fake_cuda.differentiated(), fake_cuda.Implementations() as seen:
        function, tensors = fake_cuda.CALLS[name](40, dtype)
        function(*tensors)
    return seen


@pytest.fixture
def autocast():
    torch.set_autocast_enabled("cuda", True)
    yield
    assert torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, backend", CALLS)
def test_autocast_is_off_inside_of_every_implementation(
    monkeypatch, autocast, name, backend, dtype
):
    seen = run(monkeypatch, name, backend, dtype)
    assert not any(seen.autocast)
    assert bool(seen.autocast) == bool(seen.ran)


def test_these_are_all_the_implementations(monkeypatch):
    reasons = compiled.load_cuda()
    ran = {operator for name, backend in CALLS
           for operator in run(monkeypatch, name, backend, torch.bfloat16).ran}  # fmt: skip
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    ours = {name.removeprefix("fastvlp::") for name in registered if name.startswith("fastvlp::")}
    assert ran == ours - COMPILED
    assert reasons or COMPILED <= ours


# What must wait, each for what the host needs before it can go on:
# - attention without bounds and labels without max_rows: sizes of launches and of tensors;
# - a loss over a process group: the sizes of the other ranks' shards, and their errors
#   (`validate_across_ranks`);
# - check_finite of the EMA model, the feature queue and the optimiser: whether to raise;
# - the reference implementations of attention, EMA and AdamW: they walk the values in Python.
@pytest.mark.parametrize("name, backend", CALLS)
def test_the_host_waits_for_nothing(monkeypatch, name, backend):
    assert run(monkeypatch, name, backend, torch.bfloat16).waits == []


def clip_loss(features):
    losses.ClipLoss()(features, features, 10.0, -1.0)


def siglip_loss(features):
    losses.SigLipLoss()(features, features, 10.0, -10.0)


def feature_queue(features):
    queue = FeatureQueue(50, 24, with_ids=True, device="cuda")
    queue.enqueue(features, features, ids=fake_cuda.integers(40))


def masked_tokens(features):
    vocabulary = MaskingVocabulary(90, 0, 1, 2, 3, fake_cuda.masks(90))
    ids, index = fake_cuda.integers(40, 12), fake_cuda.integers(40)
    mask_tokens(ids, vocabulary, sample_keys(7, index), whole_word=True)


def self_attention(features):
    qkv = features.view(4, 10, 2, 12)
    nn.attention(qkv, qkv, qkv, causal=True)


def layers(features):
    narrow, wide, norm = (fake_cuda.leaf(*shape) for shape in ((24,), (48,), (24,)))
    weights = fake_cuda.leaf(48, 24), wide, fake_cuda.leaf(24, 48), narrow
    feed_forward(features, Norm(norm, norm, 1e-5), *weights)


@pytest.mark.parametrize(
    "call", [clip_loss, siglip_loss, feature_queue, masked_tokens, self_attention, layers]
)
def test_the_host_waits_for_no_module(monkeypatch, call):
    monkeypatch.delenv("FASTVLP_BACKEND", raising=False)
    with fake_cuda.gpu(), fake_cuda.differentiated(), fake_cuda.Implementations() as seen:
        call(fake_cuda.leaf(40, 24))
    assert seen.waits == []


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: torch.tensor(3.0, device=x.device),
        lambda x: torch.as_tensor([1, 2], device=x.device),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.zeros(4, device="cpu")),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).all()),
        lambda x: torch.empty(4, device="cpu", pin_memory=True),
        lambda x: torch.empty(4, device="cpu").pin_memory(),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.Event.synchronize(None),
        lambda x: torch.cuda.Stream.synchronize(None),
    ],
)
def test_waits_are_seen(wait):
    with fake_cuda.gpu(), fake_cuda.Implementations() as seen:
        x = torch.empty(4, device="cuda")
        assert seen.waits == []
        # The last two are of pinned memory, which no fake tensor is in.
        with contextlib.suppress(
            DataDependentOutputException, DynamicOutputShapeException, RuntimeError, AssertionError
        ):
            wait(x)
    assert seen.waits
