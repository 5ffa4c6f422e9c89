"""What the operators need of process groups: agreement before work, exchange during it.

Every function is collective: all ranks of the group call it in the same order. Shards may have
different numbers of rows.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

_MESSAGE_BYTES = 256
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


def agree(
    group: dist.ProcessGroup, rows: int, facts: dict[str, int], error: str, device: torch.device
) -> Shards:
    """Lets every rank see every rank's rows, facts and error before any long exchange begins.

    `facts` must be equal on all ranks; `error` is empty where the rank is ready. Raises
    RuntimeError on every rank, naming the first rank that failed or differs from rank 0, so that
    no rank waits for one that has given up.
    """
    text = error.encode()[:_MESSAGE_BYTES]
    numbers = torch.tensor([rows, len(text), *facts.values()], dtype=torch.int64)
    message = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    message[: len(text)] = torch.frombuffer(bytearray(text or b"\0"), dtype=torch.uint8)[
        : len(text)
    ]
    header = torch.cat((numbers.view(torch.uint8), message)).to(device)
    world_size = dist.get_world_size(group)
    gathered = header.new_empty(world_size * header.numel())
    all_gather_rows(gathered, header, group=group)
    rows_of, facts_of = [], []
    for rank, other in enumerate(gathered.cpu().view(world_size, -1)):
        head = other[: numbers.numel() * 8].clone().view(torch.int64).tolist()
        if head[1]:
            reason = bytes(other[numbers.numel() * 8 :][: head[1]].tolist()).decode(
                errors="replace"
            )
            raise RuntimeError(f"rank {rank} of the group: {reason}")
        rows_of.append(head[0])
        facts_of.append(head[2:])
    for rank, found in enumerate(facts_of):
        for name, value, first in zip(facts, found, facts_of[0], strict=True):
            if value != first:
                raise RuntimeError(
                    f"{name}: expected the same on every rank, got {first} on rank 0 of the group "
                    f"and {value} on rank {rank}"
                )
    return Shards(group, dist.get_rank(group), tuple(rows_of))


class Gather:
    """An all-gather of row shards in flight; `rows` waits for it and gives those of some ranks.

    Shards of different sizes travel padded to the largest one.
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
    """A reduce-scatter in flight of one block for each rank; `wait` adds what came, in fp32.

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
        total = torch.zeros_like(own, dtype=torch.float32)
        for rank, part in enumerate(self._received.split(self._incoming)):
            total += own if rank == self._rank else part.float()
        return total


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

    def start(self, step: int, tensor: torch.Tensor, tag: int) -> "Passing":
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
        return Passing(dist.batch_isend_irecv(operations), tensor, received)


@dataclass
class Passing:
    """One pass of a ring in flight."""

    works: list
    sent: torch.Tensor
    received: torch.Tensor

    def wait(self) -> torch.Tensor:
        for work in self.works:
            work.wait()
        return self.received


class RingSum:
    """Sums that travel round a ring with their shards, each to its owner, terms added on the way.

    A sum starts at the first rank that receives its shard and needs no pass before that.
    """

    def __init__(self, ring: Ring, dtype: torch.dtype):
        self._ring, self._dtype = ring, dtype
        self._passing: Passing | None = None

    def add(self, step: int, part: torch.Tensor) -> None:
        """Adds this rank's term for the shard it holds after `step` passes, 1 to W - 1."""
        total = part if self._passing is None else self._passing.wait().float() + part
        self._passing = self._ring.start(step, total.to(self._dtype), tag=3)

    def home(self, own: torch.Tensor) -> torch.Tensor:
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
