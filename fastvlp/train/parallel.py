"""One process or many: devices, wrapping a model for its ranks, and gradients over ranks."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fastvlp.distributed import all_gather_rows, exchanged, group_device

# Seconds between signs of life of a first rank that works alone: much less than any timeout of a
# process group.
_BEAT = 5.0


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. `group` is None for a single process."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)


@contextlib.contextmanager
def ranks(device: str = "auto") -> Iterator[Ranks]:
    """The ranks that torchrun started, or the one of a plain process.

    A process group that exists already is used and left as it is.

    Raises:
        ValueError: there is no such device for this process.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = _device(device)
    own = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if own:
        # The CPU's group is what checkpoints are written over, in the background.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        if dist.is_initialized():
            group = dist.group.WORLD
            yield Ranks(group.rank(), group.size(), place, group if group.size() > 1 else None)
        else:
            yield Ranks(0, 1, place, None)
    finally:
        if own:
            dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cpu":
        return torch.device("cpu")
    found, number = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if number >= found:
        raise ValueError(
            f"device: expected a CUDA device for each process of this machine, got {found} of them "
            f"at process {number}; take --device cpu, or start fewer processes"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def recompute(blocks: Sequence[nn.Module]) -> None:
    """Gradient checkpointing: the blocks keep their inputs only and run again going back."""
    for block in blocks:
        block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def shard(model: nn.Module, blocks: Sequence[nn.Module], methods: Sequence[str]) -> nn.Module:
    """FSDP2 over all ranks: each block and the rest of the model, in place.

    Numbers without dimensions cannot be sharded; every rank keeps them whole, see
    `average_whole_gradients`. `methods` are those beside forward that use parameters.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    whole = {p for p in model.parameters() if p.ndim == 0}
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    for method in methods:
        register_fsdp_forward_method(model, method)
    return model


def replicate(model: nn.Module, ranks: Ranks) -> nn.Module:
    """DistributedDataParallel where there are several ranks."""
    if ranks.group is None:
        return model
    return DistributedDataParallel(model, process_group=ranks.group)


def gathered(own: dict[int, Any], ranks: Ranks) -> dict[int, Any]:
    """The entries of all ranks, in the order of their keys."""
    parts = [own]
    if ranks.group is not None:
        parts *= ranks.world_size
        dist.all_gather_object(parts, own, group=ranks.group)
    return dict(sorted(entry for part in parts for entry in part.items()))


def from_first(
    function: Callable[[], Any],
    ranks: Ranks,
    group: dist.ProcessGroup | None = None,
    *,
    takes_long: bool = False,
) -> Any:
    """What `function` returns, or raises, on the first rank, where alone it is called.

    Args:
        group: for the exchange, in place of that of the ranks.
        takes_long: `function` may take longer than the group's timeout. It is called in a thread of
            its own, and the other ranks hear every few seconds that it is still at work.
    """
    if ranks.group is None:
        return function()
    group = group or ranks.group
    found: list[Any] = [None, None]

    def call() -> None:
        try:
            found[0] = function()
        except Exception as error:  # of any kind: every rank raises it
            found[1] = _portable(error)

    if takes_long:
        _call_with_signs_of_life(call, ranks, group)
    elif ranks.is_first:
        call()
    dist.broadcast_object_list(found, src=0, group=group)
    if found[1] is not None:
        raise found[1]
    return found[0]


def _call_with_signs_of_life(
    call: Callable[[], None], ranks: Ranks, group: dist.ProcessGroup
) -> None:
    worker = threading.Thread(target=call, daemon=True)  # Ctrl-C does not wait for it
    if ranks.is_first:
        worker.start()
    done = [False]
    while not done[0]:
        if ranks.is_first:
            worker.join(_BEAT)
            done = [not worker.is_alive()]
        dist.broadcast_object_list(done, src=0, group=group)


def failing_together(group: dist.ProcessGroup | None) -> contextlib.AbstractContextManager[None]:
    """An error in the body on any of the ranks is raised on all of them at its end, in its type.

    All ranks of the group enter it, and the body has no exchange between them.
    """
    return exchanged(functools.partial(raise_first, group=group))


def loading_together(batches: Iterable, group: dist.ProcessGroup | None) -> Iterator:
    """The batches, of which all ranks of the group have the same number.

    An error in loading one on any rank is raised on all, before any of them computes with theirs.
    """
    iterator = iter(batches)
    while True:
        with failing_together(group):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


def raise_first(error: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Raises on all ranks the error of the first rank that has one; all of them call it."""
    errors = [error]
    if group is not None:
        errors = [None] * group.size()
        dist.all_gather_object(errors, _portable(error), group=group)
        if error is not None and not any(errors[: group.rank()]):
            raise error  # the rank's own, with its traceback
    for found in errors:
        if found is not None:
            raise found


def _portable(error: Exception | None) -> Exception | None:
    """The error, or one that says the same where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def sizes(rows: int, group: dist.ProcessGroup | None) -> list[int]:
    """The `rows` of each rank."""
    if group is None:
        return [rows]
    own = torch.tensor([rows], device=group_device(group))
    found = own.new_empty(group.size())
    all_gather_rows(found, own, group=group)
    return found.tolist()


def average_whole_gradients(model: nn.Module, group: dist.ProcessGroup) -> None:
    """The gradients of what `shard` left whole become their mean over the ranks."""
    for parameter in model.parameters():
        if parameter.grad is not None and not _is_sharded(parameter):
            dist.all_reduce(parameter.grad, group=group)
            parameter.grad /= group.size()


def gradient_norm(gradients: Sequence[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """The norm of all gradients together, the same on every rank; NaN or infinite if any is."""
    whole = [g for g in gradients if not _is_sharded(g)]
    shards = [g.to_local() for g in gradients if _is_sharded(g)]
    device = gradients[0].device
    total = _sum_of_squares(shards, device)
    if shards:
        dist.all_reduce(total, group=group)
    return (total + _sum_of_squares(whole, device)).sqrt()


def _sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(tensors)])
    return norms.square().sum()


def scale_(gradients: Sequence[Tensor], factor: float) -> None:
    """Multiplies the gradients in place."""
    torch._foreach_mul_([g.to_local() if _is_sharded(g) else g for g in gradients], factor)


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")
