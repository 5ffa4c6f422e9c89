"""One rank of the tests of GradCache over processes: runs every scenario, saves the gradients.

Plain modules only, because a spawned process imports this file by its name.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastvlp import GradCache, ops

WORLD_SIZE = 2
WIDTH = 6


class Towers(nn.Module):
    """Two small encoders and a temperature; a buffer that DDP broadcasts."""

    def __init__(self, width=WIDTH, dropout=0.0, dtype=torch.float64, scalar=True):
        super().__init__()
        self.image = self._tower(width, dropout)
        self.text = self._tower(width, dropout)
        self.logit_scale = nn.Parameter(torch.tensor(1.5 if scalar else [1.5]))
        self.register_buffer("shift", torch.full((width,), 0.1))
        self.to(dtype)

    def _tower(self, width, dropout):
        return nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(3 * width, width)
        )

    def forward(self, images, texts):
        x = F.normalize(self.image(images) + self.shift, dim=-1)
        y = F.normalize(self.text(texts), dim=-1)
        return x, y, self.logit_scale.exp().sum()


class Switching(Towers):
    """A tower with an extra layer that only chunks with a positive first element use."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, images, texts):
        x, y, scale = super().forward(images, texts)
        return (self.extra(x) if images[0, 0] > 0 else x), y, scale


def contrastive(x, y, scale):
    """The definition of the loss, in any dtype."""
    logits = scale * x @ y.T
    positives = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2


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


def batch(rows, seed, dtype=torch.float64, width=WIDTH):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g, dtype=torch.float64)
    return x.to(dtype), (x + torch.randn(x.shape, generator=g, dtype=torch.float64)).to(dtype)


def gradients(model):
    """The gradients by parameter name, of sharded parameters too, zeros where there is none."""
    result = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        result[name.removeprefix("module.")] = grad.detach().clone()
    return result


def _towers(kind=Towers, **kwargs):
    torch.manual_seed(0)
    return kind(**kwargs)


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
    plain, ours = DistributedDataParallel(_towers()), DistributedDataParallel(_towers())
    step = GradCache(ours, gathered_contrastive, chunk_sizes[rank]).step
    return _three_steps(rank, plain, _plain(plain)), _three_steps(rank, ours, step)


def _two_wrappers(rank):
    """Each tower in its own DDP, below a module that is not."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            towers = _towers()
            self.image = DistributedDataParallel(towers.image)
            self.text = DistributedDataParallel(towers.text)

        def forward(self, images, texts):
            return self.image(images), self.text(texts)

    def loss(x, y):
        return gathered_contrastive(x, y, 1.0)

    plain, ours = Pair(), Pair()
    step = GradCache(ours, loss, 4).step
    return _three_steps(rank, plain, _plain(plain, loss)), _three_steps(rank, ours, step)


def _unused_parameters(rank):
    """A layer that no rank uses in the chunk that synchronises, only in earlier ones."""
    images, texts = _shard(rank, 7)
    images[:, 0] = torch.tensor([1.0, -1, -1, -1, -1, -1], dtype=torch.float64)
    reference = _towers(Switching)
    ours = DistributedDataParallel(_towers(Switching), find_unused_parameters=True)
    GradCache(ours, gathered_contrastive, 2).step(images, texts)
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
        model = DistributedDataParallel(_towers())
        cache = GradCache(model, gathered_contrastive, 4)
        step = cache.step if chunked else _plain(model)
        with model.no_sync():
            step(*_shard(rank, 0))
        local = gradients(model)
        step(*_shard(rank, 1))
        found.append([local, gradients(model)])
    return tuple(found)


def _sharded(rank):
    """FSDP2, with the reductions that a step made, and the error for unlike numbers of chunks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    found, reductions = [], []
    for chunk_size in (None, 4):
        model = _towers(scalar=False)
        for module in (model.image, model.text, model):
            fully_shard(module, mesh=mesh)
        step = _plain(model) if chunk_size is None else None
        step = step or GradCache(model, gathered_contrastive, chunk_size).step
        found.append(_three_steps(rank, model, step))
        with CommDebugMode() as communication:
            step(*_shard(rank, 3))
        counts = communication.get_comm_counts()
        reductions.append(sum(n for op, n in counts.items() if "reduce_scatter" in str(op)))
    return found, reductions, _error(GradCache(model, gathered_contrastive, (2, 3)[rank]), rank)


def _error(cache, rank):
    try:
        cache.step(*_shard(rank, 0))
    except ValueError as error:
        return str(error)
    return "no error"


def _ddp_reductions(rank):
    """How often a chunked step of three chunks hands its gradients to DDP's reduction."""
    calls = []

    def hook(_, bucket):
        calls.append(bucket.is_last())
        done = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return done.then(lambda _: bucket.buffer() / WORLD_SIZE)

    model = DistributedDataParallel(_towers())
    model.register_comm_hook(None, hook)
    GradCache(model, gathered_contrastive, 2).step(*_shard(rank, 0))
    return sum(calls)


def _fused_loss(rank, schedule):
    """Unequal shards in float32 with the operator's own exchange: the loss and its gradients."""
    images, texts = batch(6 * WORLD_SIZE, 0, torch.float32)
    own = (slice(0, 5), slice(5, None))[rank]
    model = DistributedDataParallel(_towers(dtype=torch.float32))

    def loss(x, y, scale):
        return ops.contrastive(x, y, scale, group=dist.group.WORLD, schedule=schedule)

    value = GradCache(model, loss, 3).step(images[own], texts[own])
    dist.all_reduce(value)
    return value / WORLD_SIZE, gradients(model)


def main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    results = {
        "ddp": _ddp(rank, (4, 4)),
        "ddp_unlike_chunk_counts": _ddp(rank, (1, 8)),
        "ddp_two_wrappers": _two_wrappers(rank),
        "ddp_unused_parameters": _unused_parameters(rank),
        "ddp_accumulation": _accumulation(rank),
        "ddp_reductions": _ddp_reductions(rank),
        "gather": _fused_loss(rank, "gather"),
        "ring": _fused_loss(rank, "ring"),
    }
    results["fsdp"], results["fsdp_reductions"], results["fsdp_error"] = _sharded(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
