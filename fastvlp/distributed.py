"""What the operators need of process groups: validation across ranks before work, exchange during
it.

Every function is collective: all ranks of the group call it in the same order. Shards may have
different numbers of rows.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeGuard

import torch
import torch.distributed as dist

from ._autograd import Function

# What `validate_across_ranks` has room for.
_MESSAGE_BYTES, _MOST_FACTS, _MOST_VALUES = 512, 12, 4
_ROUNDING = 1e-5  # relative, between equal values of two ranks
# torch 2.14 has renamed it and warns of the old name at every call.
all_gather_rows = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Shards:
    """How the rows of a global batch lie on the ranks of `group`."""

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]  # rows of each rank

    @property
    def world_size(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        """Rows on the ranks before this one."""
        return self.offset_of(self.rank)

    def offset_of(self, rank: int) -> int:
        """Rows on the ranks before `rank`."""
        return sum(self.sizes[:rank])


def resolve(group_name: str) -> dist.ProcessGroup:
    """The process group of this name; operators carry names, because they cannot carry groups."""
    return dist.distributed_c10d._resolve_process_group(group_name)


def group_device(group: dist.ProcessGroup) -> torch.device:
    """Where small tensors have to lie for a collective of `group`."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def spans_ranks(group: dist.ProcessGroup | None) -> TypeGuard[dist.ProcessGroup]:
    """Whether there is a group, and of more than one rank. Raises TypeError for anything else."""
    if group is None:
        return False
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: expected a process group that this rank belongs to, or None, got {group!r}"
        )
    return group.size() > 1


def validate_across_ranks(
    group: dist.ProcessGroup,
    call: str,
    *,
    rows: int = 0,
    facts: Mapping[str, int] = MappingProxyType({}),
    values: Mapping[str, torch.Tensor] = MappingProxyType({}),
    error: Exception | None = None,
    device: torch.device | None = None,
) -> Shards:
    """Lets every rank see every rank's call, rows, facts, values and error before long exchanges.

    One exchange of a fixed size, whatever the ranks do: a rank that reports an error meets those
    that are ready, and ranks in different calls find out. The host waits once, for what was
    gathered; values are not read before that.

    Args:
        call: what the rank is doing, the same on all ranks.
        rows: of this rank's shard; they may differ.
        facts: integers that must be equal on all ranks, at most 12.
        values: one-element tensors that must be finite and equal on all ranks, whole numbers
            exactly and others up to rounding, at most 4.
        error: why this rank cannot take part; None where it is ready.
        device: where the exchange takes place; by default where the group's collectives do.

    Raises:
        RuntimeError: on every rank, naming the first rank that failed or differs from rank 0, so
            that no rank waits for one that has given up. Its `agreed` is the name of the group,
            whose ranks need no report of it any more.
    """
    text = (call if error is None else f"{type(error).__name__}: {error}").encode()[:_MESSAGE_BYTES]
    numbers = [rows, error is not None, len(text), *facts.values()]
    numbers += [0] * (3 + _MOST_FACTS - len(numbers))
    device = device or group_device(group)
    message = torch.frombuffer(bytearray(text.ljust(_MESSAGE_BYTES, b"\0")), dtype=torch.uint8)
    head = torch.cat((torch.tensor(numbers, dtype=torch.int64).view(torch.uint8), message))
    measured = torch.zeros(_MOST_VALUES, dtype=torch.float64, device=device)
    if values:
        own = [value.detach().reshape(()).to(device, torch.float64) for value in values.values()]
        measured[: len(own)] = torch.stack(own)
    header = torch.cat((head.to(device), measured.view(torch.uint8)))
    gathered = header.new_empty(dist.get_world_size(group) * header.numel())
    all_gather_rows(gathered, header, group=group)
    ranks = [_Head.read(each) for each in gathered.cpu().view(-1, header.numel())]
    try:
        _compare(ranks, facts, values)
    except RuntimeError as error:
        error.agreed = group.group_name
        raise
    return Shards(group, dist.get_rank(group), tuple(each.rows for each in ranks))


@contextmanager
def reporting(group: dist.ProcessGroup | None, call: str) -> Iterator[None]:
    """What precedes a `validate_across_ranks`: an error in the body, of any type, is raised on all
    ranks.

    The others learn of it by their `validate_across_ranks`, or by their own report. Without a
    group, or alone in one, the error passes unchanged.
    """
    try:
        yield
    except Exception as error:
        if spans_ranks(group) and not _is_known(error, group):
            validate_across_ranks(group, call, error=error)
        raise


@contextmanager
def exchanged(exchange: Callable[[Exception | None], None]) -> Iterator[None]:
    """Hands the body's error, or None, to `exchange`, which raises what all ranks shall raise."""
    own = None
    try:
        yield
    except Exception as error:
        own = error
    exchange(own)


@contextmanager
def together(groups: Iterable[dist.ProcessGroup], call: str) -> Iterator[None]:
    """All ranks run the body; an error in it, of any type, is raised on all ranks of all groups.

    Without groups the error passes unchanged.
    """

    def exchange(own: Exception | None) -> None:
        found = own
        for group in groups:
            if _is_known(own, group):
                continue
            try:
                validate_across_ranks(group, call, error=found)
            except RuntimeError as error:
                found = error
        if found is own is not None:
            raise own
        if found is not None:
            raise found from own

    with exchanged(exchange):
        yield


def _is_known(error: Exception | None, group: dist.ProcessGroup) -> bool:
    # The other ranks of the exchange that raised it are not in another one.
    return getattr(error, "agreed", None) == group.group_name


@dataclass(frozen=True)
class _Head:
    """What one rank sent in `validate_across_ranks`."""

    rows: int
    failed: bool
    facts: list[int]
    text: str
    values: list[float]

    @classmethod
    def read(cls, header: torch.Tensor) -> "_Head":
        sizes = (8 * (3 + _MOST_FACTS), _MESSAGE_BYTES, 8 * _MOST_VALUES)
        numbers, message, values = (part.clone() for part in header.split(sizes))
        rows, failed, length, *facts = numbers.view(torch.int64).tolist()
        text = bytes(message[:length].tolist()).decode(errors="replace")
        return cls(rows, bool(failed), facts, text, values.view(torch.float64).tolist())


def _compare(ranks: list[_Head], facts: Iterable[str], values: Mapping[str, torch.Tensor]) -> None:
    first = ranks[0]
    for rank, found in enumerate(ranks):
        if found.failed:
            raise RuntimeError(f"rank {rank} of the group: {found.text}")
    for rank, found in enumerate(ranks):
        if found.text != first.text:
            raise RuntimeError(
                f"the ranks of the group are in different calls: rank 0 in {first.text}, rank "
                f"{rank} in {found.text}; every rank has to make the same calls in the same order"
            )
        for name, value in zip(values, found.values, strict=False):
            if not math.isfinite(value):
                raise RuntimeError(
                    f"rank {rank} of the group: {name}: expected a finite value, got {value}; the "
                    "training has diverged or the parameter was never clamped"
                )
        # CPUs of different kinds may round a parameter's exponential differently.
        unlike = [
            *(
                (n, a, b)
                for n, a, b in zip(facts, first.facts, found.facts, strict=False)
                if a != b
            ),
            *(
                (n, a, b)
                for n, a, b in zip(values, first.values, found.values, strict=False)
                if not math.isclose(
                    a, b, rel_tol=_ROUNDING if values[n].is_floating_point() else 0.0
                )
            ),
        ]
        if unlike:
            name, expected, value = unlike[0]
            raise RuntimeError(
                f"{name}: expected the same on every rank, got {expected} on rank 0 of the group "
                f"and {value} on rank {rank}"
            )


class Gather:
    """An all-gather of row shards in flight; `rows` waits for it and gives those of some ranks.

    Shards of different sizes are sent padded to the largest one.
    """

    def __init__(self, shard: torch.Tensor, shards: Shards):
        self._sizes = shards.sizes
        largest = max(shards.sizes)
        self._own = shard.contiguous()
        if len(shard) < largest:
            self._own = shard.new_zeros(largest, *shard.shape[1:])
            self._own[: len(shard)] = shard
        self._all = shard.new_empty(len(self._sizes), largest, *shard.shape[1:])
        self._work = all_gather_rows(
            self._all.flatten(0, 1), self._own, group=shards.group, async_op=True
        )

    def rows(self, ranks: slice) -> torch.Tensor:
        """The rows of these ranks one after another; no copy where nothing was padded."""
        self._work.wait()
        parts, sizes = self._all[ranks], self._sizes[ranks]
        if all(size == parts.shape[1] for size in sizes):
            return parts.flatten(0, 1)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class ScatterSum:
    """A reduce-scatter in flight of one block for each rank; `wait` adds them, at least in fp32.

    The blocks go to their owners as they are and are added in rank order: the same bytes on the
    wire as a ring reduce-scatter, any shard sizes, and a sum that does not depend on timing.
    `parts[q]` are the rows for rank q; this rank's own part is given to `wait`, because its
    computation may overlap with the exchange.
    """

    def __init__(self, parts: list[torch.Tensor | None], shards: Shards, like: torch.Tensor):
        rank, rows = shards.rank, shards.sizes[shards.rank]
        nothing = like.new_empty(0, like.shape[1])
        outgoing = [nothing if q == rank else part for q, part in enumerate(parts)]
        self._rank = rank
        self._incoming = [rows * (q != rank) for q in range(shards.world_size)]
        self._send = torch.cat(outgoing).to(like.dtype)
        self._received = like.new_empty(sum(self._incoming), like.shape[1])
        self._work = dist.all_to_all_single(
            self._received,
            self._send,
            self._incoming,
            [len(part) for part in outgoing],
            group=shards.group,
            async_op=True,
        )

    def wait(self, own: torch.Tensor) -> torch.Tensor:
        self._work.wait()
        total = torch.zeros_like(own, dtype=torch.promote_types(own.dtype, torch.float32))
        for rank, part in enumerate(self._received.split(self._incoming)):
            total += own if rank == self._rank else part
        return total


def gather_rows(shard: torch.Tensor, shards: Shards) -> torch.Tensor:
    """The rows of all ranks, in rank order; their gradients, added over ranks, go to the owners."""
    return _GatherRows.apply(shard, shards)


class _GatherRows(Function):
    @staticmethod
    def forward(shard, shards):
        return Gather(shard, shards).rows(slice(None))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shards = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        parts = list(grad.split(ctx.shards.sizes))
        own = parts[ctx.shards.rank]
        wire = own.new_empty(0, *own.shape[1:], dtype=torch.promote_types(own.dtype, torch.float32))
        return ScatterSum(parts, ctx.shards, wire).wait(own).to(grad.dtype), None


class Ring:
    """Passes tensors around while the caller works on what it holds.

    `direction` 1 passes to the next rank, -1 to the previous one.
    """

    def __init__(self, shards: Shards, direction: int = 1):
        self._shards, self._direction = shards, direction
        ranks = dist.get_process_group_ranks(shards.group)
        self._to = ranks[(shards.rank + direction) % shards.world_size]
        self._from = ranks[(shards.rank - direction) % shards.world_size]

    def holder(self, step: int) -> int:
        """Whose shard this rank holds after `step` passes."""
        return (self._shards.rank - self._direction * step) % self._shards.world_size

    def start(self, step: int, tensor: torch.Tensor, tag: int) -> "P2PHandle":
        """Sends `tensor`, the one held after `step` passes, and receives its successor.

        Exchanges in flight at the same time carry different tags.
        """
        rows = self._shards.sizes[self.holder(step + 1)]
        tensor = tensor.contiguous()
        received = tensor.new_empty(rows, *tensor.shape[1:])
        group = self._shards.group
        operations = [
            dist.P2POp(dist.isend, tensor, self._to, group, tag),
            dist.P2POp(dist.irecv, received, self._from, group, tag),
        ]
        # The sent tensor is kept alive until the pass is over.
        return P2PHandle(dist.batch_isend_irecv(operations), tensor, received)


@dataclass
class P2PHandle:
    """One pass of a ring in flight."""

    works: list
    sent: torch.Tensor
    received: torch.Tensor

    def wait(self) -> torch.Tensor:
        for work in self.works:
            work.wait()
        return self.received


class RingSum:
    """Sums passed round a ring with their shards, each to its owner, terms added at each rank.

    A sum starts at the first rank that receives its shard and needs no pass before that.
    """

    def __init__(self, ring: Ring, dtype: torch.dtype):
        self._ring, self._dtype = ring, dtype
        self._passing: P2PHandle | None = None

    def add(self, step: int, part: torch.Tensor) -> None:
        """Adds this rank's term for the shard it holds after `step` passes, 1 to W - 1."""
        total = part if self._passing is None else self._passing.wait().float() + part
        self._passing = self._ring.start(step, total.to(self._dtype), tag=3)

    def reduce(self, own: torch.Tensor) -> torch.Tensor:
        """The float32 sum for this rank's own shard, its own term added."""
        return self._passing.wait().float() + own


def merge_log_sum_exp(lse: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """log of the sum over ranks of exp(lse), elementwise, in two reductions of its size."""
    highest = lse.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    # A NaN is not a maximum; the sum brings it back.
    shift = torch.where(highest.isfinite(), highest, torch.zeros_like(highest))
    total = (lse - shift).exp()
    dist.all_reduce(total, group=group)
    return total.log() + shift
