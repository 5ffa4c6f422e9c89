"""GradCache over ranks: the gradients of the unchunked step, under DDP and FSDP2."""

import pytest
import torch
import torch.distributed as dist
from fastvlp_tests import gloo_ranks
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from fastvlp_tests.two_towers import (
    WIDTH,
    Towers,
    assert_equal_to_rounding,
    batch,
    contrastive,
    gradients,
    plain_step,
    towers,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastvlp import GradCache, ops

WORLD_SIZE = 2


class Gather(torch.autograd.Function):
    """The rows of all ranks; their gradients, added over ranks, go back to the owners."""

    @staticmethod
    def forward(ctx, shard):
        parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, shard)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gathered_contrastive(x, y, scale):
    """The loss of the global batch on every rank, its features gathered with gradients."""
    return contrastive(Gather.apply(x), Gather.apply(y), scale)


class Switching(Towers):
    """A tower with an extra layer that only chunks with a positive first element use."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, images, texts):
        x, y, scale = super().forward(images, texts)
        return (self.extra(x) if images[0, 0] > 0 else x), y, scale


def _shard(rank, seed):
    x, y = batch(6 * WORLD_SIZE, seed)
    return x[6 * rank : 6 * rank + 6], y[6 * rank : 6 * rank + 6]


def _three_steps(rank, model, step):
    """Gradients of three steps; the parameters change between them."""
    found = []
    for seed in range(3):
        model.zero_grad()
        step(*_shard(rank, seed))
        found.append(gradients(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
    return found


def _plain(model, loss=gathered_contrastive):
    return lambda *inputs: loss(*model(*inputs)).backward()


def _ddp(rank, chunk_sizes):
    plain, ours = DistributedDataParallel(towers()), DistributedDataParallel(towers())
    step = GradCache(ours, gathered_contrastive, chunk_sizes[rank]).step
    return _three_steps(rank, plain, _plain(plain)), _three_steps(rank, ours, step)


def _two_wrappers(rank):
    """Each tower in its own DDP, below a module that is not."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            own = towers()
            self.image = DistributedDataParallel(own.image)
            self.text = DistributedDataParallel(own.text)

        def forward(self, images, texts):
            return self.image(images), self.text(texts)

    def loss(x, y):
        return gathered_contrastive(x, y, 1.0)

    plain, ours = Pair(), Pair()
    step = GradCache(ours, loss, 4).step
    return _three_steps(rank, plain, _plain(plain, loss)), _three_steps(rank, ours, step)


def _against_one_graph(rank, kind=Towers, **kwargs):
    """Plain: the chunks' graphs in one, gradients averaged by hand. Ours: GradCache under DDP."""
    images, texts = _shard(rank, 7)
    images[:, 0] = torch.tensor([1.0, -1, -1, -1, -1, -1], dtype=torch.float64)
    reference = towers(kind=kind, **kwargs)
    find = kind is Switching
    ours = DistributedDataParallel(towers(kind=kind, **kwargs), find_unused_parameters=find)
    torch.manual_seed(100 + rank)  # dropout differs between ranks
    GradCache(ours, gathered_contrastive, 2).step(images, texts)
    torch.manual_seed(100 + rank)
    parts = [reference(x, y) for x, y in zip(images.split(2), texts.split(2), strict=True)]
    x, y, scales = zip(*parts, strict=True)
    gathered_contrastive(torch.cat(x), torch.cat(y), scales[0]).backward()
    for parameter in reference.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= WORLD_SIZE
    return [gradients(reference)], [gradients(ours)]


def _accumulation(rank):
    """Two steps, of which only the second one synchronises, by the caller's own no_sync."""
    found = []
    for chunked in (False, True):
        model = DistributedDataParallel(towers())
        cache = GradCache(model, gathered_contrastive, 4)
        step = cache.step if chunked else _plain(model)
        with model.no_sync():
            step(*_shard(rank, 0))
        local = gradients(model)
        step(*_shard(rank, 1))
        found.append([local, gradients(model)])
    return tuple(found)


def _sharded(rank):
    """FSDP2, with the reductions that a step made, and with unlike numbers of chunks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    found, reductions = [], []
    for chunk_size in (None, 4, (2, 3)[rank]):
        model = towers(scalar=False)
        for module in (model.image, model.text, model):
            fully_shard(module, mesh=mesh)
        step = _plain(model) if chunk_size is None else None
        step = step or GradCache(model, gathered_contrastive, chunk_size).step
        found.append(_three_steps(rank, model, step))
        with CommDebugMode() as communication:
            step(*_shard(rank, 3))
        counts = communication.get_comm_counts()
        reductions.append(sum(n for op, n in counts.items() if "reduce_scatter" in str(op)))
    return found, reductions


def _ddp_reductions(rank):
    """How often a chunked step of three chunks hands its gradients to DDP's reduction."""
    calls = []

    def hook(_, bucket):
        calls.append(bucket.is_last())
        done = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return done.then(lambda _: bucket.buffer() / WORLD_SIZE)

    model = DistributedDataParallel(towers())
    model.register_comm_hook(None, hook)
    GradCache(model, gathered_contrastive, 2).step(*_shard(rank, 0))
    return sum(calls)


def _fused_loss(rank, schedule):
    """Unequal shards in float32 with the operator's own exchange: the loss and its gradients."""
    images, texts = batch(6 * WORLD_SIZE, 0, torch.float32)
    own = (slice(0, 5), slice(5, None))[rank]
    model = DistributedDataParallel(towers(dtype=torch.float32))

    def loss(x, y, scale):
        return ops.contrastive(x, y, scale, group=dist.group.WORLD, schedule=schedule)

    value = GradCache(model, loss, 3).step(images[own], texts[own])
    dist.all_reduce(value)
    return value / WORLD_SIZE, gradients(model)


def scenarios(rank):
    results = {
        "ddp": _ddp(rank, (4, 4)),
        "ddp_unlike_chunk_counts": _ddp(rank, (1, 8)),
        "ddp_two_wrappers": _two_wrappers(rank),
        # A layer that no rank uses in the chunk that synchronises, only in earlier ones.
        "ddp_unused_parameters": _against_one_graph(rank, Switching),
        "ddp_dropout": _against_one_graph(rank, dropout=0.5),
        "ddp_accumulation": _accumulation(rank),
        "ddp_reductions": _ddp_reductions(rank),
        "gather": _fused_loss(rank, "gather"),
        "ring": _fused_loss(rank, "ring"),
    }
    (plain, *chunked), results["fsdp_reductions"] = _sharded(rank)
    results["fsdp"], results["fsdp_unlike_chunk_counts"] = ((plain, ours) for ours in chunked)
    return results


@pytest.fixture(scope="module")
def ranks():
    found = gloo_ranks.run(WORLD_SIZE, scenarios)
    assert all(isinstance(results, dict) for results in found), found
    return found


@pytest.mark.parametrize(
    "scenario",
    [
        "ddp",
        "ddp_unlike_chunk_counts",
        "ddp_two_wrappers",
        "ddp_unused_parameters",
        "ddp_dropout",
        "ddp_accumulation",
        "fsdp",
        "fsdp_unlike_chunk_counts",
    ],
)
def test_ranks_have_the_gradients_of_the_plain_distributed_step(ranks, scenario):
    for rank in ranks:
        plain, ours = rank[scenario]
        for expected, found in zip(plain, ours, strict=True):
            assert any(gradient.any() for gradient in expected.values())
            assert_equal_to_rounding(found, expected, 6 * WORLD_SIZE)


def test_gradients_are_exchanged_once_a_step(ranks):
    for rank in ranks:
        assert rank["ddp_reductions"] == 1
        plain, *ours = rank["fsdp_reductions"]
        assert ours == [plain] * 2 and plain > 0


@pytest.mark.parametrize("schedule", ["gather", "ring"])
def test_ranks_with_the_distributed_loss_have_the_gradients_of_one_process(ranks, schedule):
    inputs = batch(6 * WORLD_SIZE, 0)
    exact_loss, exact = plain_step(towers(dtype=torch.float32).double(), contrastive, *inputs)
    narrow = batch(6 * WORLD_SIZE, 0, torch.float32)
    eager_loss, eager = plain_step(towers(dtype=torch.float32), contrastive, *narrow)
    for rank in ranks:
        loss, found = rank[schedule]
        ulp = epsilon(torch.float32)
        assert_as_accurate("loss", loss, eager_loss, exact_loss, ulp * exact_loss.item())
        for name, gradient in found.items():
            floor = ulp * exact[name].norm().item()
            assert_as_accurate(name, gradient, eager[name], exact[name], floor)
