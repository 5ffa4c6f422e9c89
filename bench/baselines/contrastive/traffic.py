"""Bytes that a rank sends, counted from the exchanges it really makes.

Every collective and every send of torch.distributed reaches PyTorch's dispatcher as an
operator of the namespace `c10d`, whoever asked for it: torch.distributed, the functional
collectives, autograd's backward, a custom operator, C++. `Traffic` listens there.

An operator says which tensors are exchanged, not how. The bytes on the wire are those of the
standard ring algorithms, W being the ranks of the group and `total` the bytes of the whole
gathered, scattered or reduced tensor:

    all-gather, reduce-scatter   (W-1)/W * total
    all-reduce                   2 (W-1)/W * total
    broadcast, reduce            (W-1)/W * total, the mean over the ranks
    all-to-all, scatter, gather  what goes to other ranks
    send                         all of it
    receive, barrier             0
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# For readers of a result.
RULE = (
    "bytes per rank on the wire: all-gather and reduce-scatter (W-1)/W of the whole, "
    "all-reduce twice that, all-to-all, scatter, gather and sends what goes to others"
)

Observer = Callable[[str, Mapping[str, Any]], None]


def loaded(namespace: str) -> set[str]:
    """Names of the operators of a namespace, their overloads left out."""
    everything = torch._C._dispatch_get_all_op_names()
    found = (name.partition("::") for name in everything)
    return {name.partition(".")[0] for space, _, name in found if space == namespace}


class Listener:
    """While open, calls `observe(operator, arguments by name)` before each operator runs.

    operators: names in `namespace`; those not loaded so far are passed over. They are seen
    on every thread, also inside other operators, which hide what they call from a
    TorchDispatchMode.
    """

    def __init__(self, namespace: str, operators: Sequence[str], observe: Observer) -> None:
        self._namespace, self._operators, self._observe = namespace, operators, observe

    def __enter__(self) -> Listener:
        # This key lies above every device's and is in the set of every call.
        self._key = torch._C.DispatchKey.BackendSelect
        self._library = torch.library.Library(self._namespace, "IMPL")
        for name in loaded(self._namespace) & set(self._operators):
            self._library.impl(name, self._heard(name), self._key.name, with_keyset=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._library._destroy()

    def _heard(self, name: str) -> Callable[..., Any]:
        operator = getattr(getattr(torch.ops, self._namespace), name).default
        names = [argument.name for argument in operator._schema.arguments]
        below = torch._C._dispatch_keyset_full_after(self._key)
        observe = self._observe

        def run(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            observe(name, {**dict(zip(names, args, strict=False)), **kwargs})
            return operator.redispatch(keyset & below, *args, **kwargs)

        return run


class Traffic(Listener):
    """Counts, while open, the bytes this rank sends to others.

    `bytes_sent` is their sum, `by_operator` its parts, `calls` how often each was called.
    """

    def __init__(self) -> None:
        super().__init__("c10d", sorted(loaded("c10d") - _NO_EXCHANGE), self._exchange)
        self.by_operator: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def bytes_sent(self) -> int:
        # A ring's share of a tensor that W does not divide is not whole.
        return math.ceil(sum(self.by_operator.values()))

    def _exchange(self, name: str, arguments: Mapping[str, Any]) -> None:
        rule = _RULES.get(name)
        if rule is None:
            raise NotImplementedError(f"c10d::{name}: no rule for the bytes that it sends")
        group = dist.ProcessGroup.unbox(arguments["process_group"])
        self.calls[name] += 1
        self.by_operator[name] += rule(arguments, group.rank(), group.size())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for part in value or ():
            yield from _tensors(part)


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))


def _ring(argument: str, passes: int = 1) -> Callable[..., float]:
    """All but one W-th of the named argument, as often as it goes round."""
    return lambda arguments, _, world: passes * (world - 1) / world * _bytes(arguments[argument])


def _to_others(arguments: Mapping[str, Any], rank: int, _: int) -> float:
    tensors = arguments["input_tensors"]
    return _bytes(tensors) - _bytes(tensors[rank])


def _rows_to_others(arguments: Mapping[str, Any], rank: int, world: int) -> float:
    tensor, sizes = arguments["input"], arguments["input_split_sizes"]
    if not sizes:
        return _bytes(tensor) * (world - 1) / world
    return _bytes(tensor) - _bytes(tensor.narrow(0, sum(sizes[:rank]), sizes[rank]))


def _scatter(arguments: Mapping[str, Any], rank: int, _: int) -> float:
    if rank != arguments["root_rank"]:
        return 0
    tensors = arguments["input_tensors"][0]
    return _bytes(tensors) - _bytes(tensors[rank])


def _gather(argument: str) -> Callable[..., float]:
    return lambda arguments, rank, _: (rank != arguments["root_rank"]) * _bytes(arguments[argument])


def _nothing(*_: Any) -> float:
    return 0


_NO_EXCHANGE = {"check_for_nan"}
_RULES: dict[str, Callable[[Mapping[str, Any], int, int], float]] = {
    "allgather_": _ring("output_tensors"),
    "_allgather_base_": _ring("output_tensor"),
    "allgather_coalesced_": _ring("output_lists"),
    "allgather_into_tensor_coalesced_": _ring("outputs"),
    "reduce_scatter_": _ring("input_tensors"),
    "_reduce_scatter_base_": _ring("input_tensor"),
    "reduce_scatter_tensor_coalesced_": _ring("inputs"),
    "allreduce_": _ring("tensors", passes=2),
    "allreduce_coalesced_": _ring("tensors", passes=2),
    "broadcast_": _ring("tensors"),
    "reduce_": _ring("tensors"),
    "alltoall_": _to_others,
    "alltoall_base_": _rows_to_others,
    "scatter_": _scatter,
    "gather_": _gather("input_tensors"),
    "gather_into_tensor_": _gather("input_tensor"),
    "send": lambda arguments, _, __: _bytes(arguments["tensors"]),
    "recv_": _nothing,
    "recv_any_source_": _nothing,
    "barrier": _nothing,
    "monitored_barrier_": _nothing,
}


def loopback_bytes() -> int | None:
    """Bytes sent so far over this machine's loopback by anyone; None where that is unknown.

    Ranks of one machine talk through it under gloo: over a call it checks the counted bytes,
    headers and whatever else was said meanwhile included.
    """
    table = Path("/proc/net/dev")
    if table.exists():
        for line in table.read_text().splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == "lo":
                return int(numbers.split()[8])
    return None
