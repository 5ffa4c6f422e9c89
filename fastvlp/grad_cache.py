"""Training steps on batches whose activations do not fit into memory, with exact gradients.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
arXiv 2101.06983, section 3. A contrastive loss couples all pairs of a batch, so that plain
gradient accumulation changes it. But it sees the encoder only through its features: once the
gradient with respect to the features is known, each chunk of the batch can go back through the
encoder alone.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .distributed import together


class GradCache:
    """Accumulates the gradients of `loss(*model(*inputs))` with the activations of one chunk.

    1. Every chunk of the inputs goes through `model` without gradients; the random state before
       each chunk is kept.
    2. The loss is computed once on the joined outputs and gives their gradients.
    3. Every chunk goes through `model` again under its random state, now with gradients, and
       takes its part of the outputs' gradients back to the parameters.

    Cost: one more forward pass of the model. Memory: the activations of `chunk_size` rows, the
    outputs of the whole batch with their gradients, and what the loss needs.

        step = GradCache(model, ClipLoss(), chunk_size=256)
        loss = step.step(images, tokens)
        optimizer.step()

    Exact for models that treat rows independently, dropout included. Not exact are modules that
    mix the rows of a batch or change their own state: BatchNorm normalises by the statistics of
    each chunk and updates its running statistics twice, and state that a forward pass both
    changes and reads (spectral norm, feature queues) has moved on in phase 3. Only the generators
    of torch, on the CPU and on the CUDA devices of model and inputs, are restored; random numbers
    from elsewhere (`random`, NumPy, a `torch.Generator` of the model's own) would differ between
    phases 1 and 3.

    DistributedDataParallel: only the last chunk synchronises gradients; wrap `step` in the
    wrapper's own `no_sync()` to accumulate over several steps. Ranks may have different numbers of
    rows and chunks. A loss with collectives runs them once a step, on every rank between phases 1
    and 3. What the loss needs of the model's parameters (a temperature, for example) has to be an
    output of the model. `static_graph=True` is refused.

    FSDP2 (`fully_shard`): the last chunk of each step synchronises. Each forward pass gathers
    parameters, so a rank with fewer chunks than another makes the missing passes without rows,
    which the model then has to take.

    torch.autocast around `step` holds for every forward pass and the loss; backward passes run
    without it, as they do in a plain step that ends the context before `backward`.

    Args:
        model: called with a chunk of the inputs, usually an nn.Module. It returns a tensor, a
            tuple, a list or a mapping of tensors and None. A tensor has one row for each row of
            the inputs, or no dimensions and then must not depend on the inputs (a temperature).
        loss: called as `loss(*outputs)`, for a mapping as `loss(**outputs)`; returns one number.
        chunk_size: rows of the inputs that go through the model at a time; the last chunk may
            have fewer.
        backward: called with the loss in place of `loss.backward()`, for example
            `lambda loss: scaler.scale(loss).backward()` with a GradScaler.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Examples:
        >>> import torch
        >>> from fastvlp import GradCache
        >>> from fastvlp.losses import ClipLoss
        >>> class Towers(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.image, self.text = torch.nn.Linear(12, 16), torch.nn.Linear(8, 16)
        ...     def forward(self, images, texts):
        ...         return self.image(images), self.text(texts), torch.tensor(10.0)
        >>> model = Towers()
        >>> cache = GradCache(model, ClipLoss(), chunk_size=2)
        >>> loss = cache.step(torch.randn(8, 12), torch.randn(8, 8))
        >>> model.image.weight.grad.shape
        torch.Size([16, 12])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        loss: Callable[..., Tensor],
        chunk_size: int,
        *,
        backward: Callable[[Tensor], None] | None = None,
    ):
        for name, value in (("model", model), ("loss", loss), ("backward", backward)):
            if not (callable(value) or (name == "backward" and value is None)):
                raise TypeError(f"{name}: expected a callable, got {type(value).__name__}")
        if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
            raise TypeError(f"chunk_size: expected an int, got {type(chunk_size).__name__}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least one row, got {chunk_size}")
        if any(getattr(module, "static_graph", False) for module in _modules(model)):
            raise ValueError(
                "model: DistributedDataParallel(static_graph=True) counts on one backward pass a "
                "step, and each chunk makes one; wrap the model with static_graph=False"
            )
        self.model = model
        self.loss = loss
        self.chunk_size = chunk_size
        self.backward = backward or Tensor.backward

    def step(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Adds the gradients of `loss(*model(*inputs, **kwargs))` to `.grad`; returns the loss.

        Args:
            inputs, kwargs: tensors are split along their first dimension, which must be the same
                for all of them; tensors without dimensions and anything that is not a tensor go
                whole to every chunk. Inputs that require gradients must be leaves.

        Returns:
            The loss, detached. The random state afterwards is that after phases 1 and 2.

        Raises:
            TypeError, ValueError: inputs, outputs or the loss are not as described.
            RuntimeError: the loss gave no output a gradient; over ranks (a model in
                DistributedDataParallel or FSDP2, a loss with a `group`), on every rank, whatever
                one rank raises. An error inside of a model whose forward pass has collectives
                (FSDP2's gathers, DDP's broadcasts of buffers) does not reach all ranks: the
                others wait in those collectives until the group's timeout.

        An error in phase 1 or 2, thus every error above, leaves each `.grad` as it was, except
        those of the loss's own parameters. An error raised by the model in phase 3 leaves the
        chunks before it accumulated: call `zero_grad` before going on.
        """
        modules = _modules(self.model)
        groups = _groups(modules, self.loss)
        with together(groups, "the inputs of GradCache"):
            chunks = _split(inputs, kwargs, self.chunk_size)
        chunks += [chunks[-1].without_rows()] * (_most_chunks(modules, len(chunks)) - len(chunks))
        devices = _cuda_devices(modules, [*inputs, *kwargs.values()])
        # Weights that autocast converted must serve neither a later step, whose weights are
        # others, nor, when converted without gradients, the passes with gradients.
        torch.clear_autocast_cache()
        with together(groups, "the first forward pass of GradCache"):
            outputs, states = self._encode(chunks, devices)
        with together(groups, "the loss of GradCache"):
            loss, gradients = self._differentiate_loss(outputs)
        torch.clear_autocast_cache()
        with torch.random.fork_rng(devices):
            self._backpropagate(chunks, states, gradients, modules)
        return loss

    def _encode(self, chunks, devices):
        parts, states = [], []
        with torch.no_grad():
            for chunk in chunks:
                states.append(_RandomState(devices))
                parts.append(chunk.encode(self.model))
        return {name: _join(name, [part[name] for part in parts]) for name in parts[0]}, states

    def _differentiate_loss(self, outputs):
        # Integer names are positions; see `_named`.
        positional = [value for name, value in outputs.items() if isinstance(name, int)]
        named = {name: value for name, value in outputs.items() if isinstance(name, str)}
        loss = self.loss(*positional, **named)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss: expected a tensor as its result, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"loss: expected one number as its result, got {list(loss.shape)}")
        with _no_autocast(loss):
            self.backward(loss)
        gradients = {
            name: value.grad
            for name, value in outputs.items()
            if value is not None and value.grad is not None
        }
        if not gradients:
            raise RuntimeError(
                "loss: after backward no output of the model has a gradient; compute the loss from "
                "the outputs without detaching them, and let `backward` run its backward pass"
            )
        return loss.detach(), gradients

    def _backpropagate(self, chunks, states, gradients, modules):
        last = len(chunks) - 1
        for i, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
            with contextlib.nullcontext() if i == last else no_sync(modules):
                state.restore()
                outputs = chunk.encode(self.model)
                # A number belongs to no chunk. The last one takes its gradient, because DDP
                # expects every parameter to take part in the pass that synchronises.
                parts = {
                    name: gradient[chunk.rows] if gradient.ndim else gradient
                    for name, gradient in gradients.items()
                    if outputs[name].requires_grad and (gradient.ndim or i == last)
                }
                if parts:
                    with _no_autocast(*parts.values()):
                        torch.autograd.backward(
                            [outputs[name] for name in parts], [*parts.values()]
                        )


@dataclass(frozen=True)
class _Chunk:
    rows: slice
    inputs: tuple
    kwargs: dict

    def without_rows(self) -> "_Chunk":
        """A chunk after this one that has no rows."""
        end = slice(self.rows.stop, self.rows.stop)
        inputs = tuple(value[:0] if _is_batched(value) else value for value in self.inputs)
        kwargs = {k: value[:0] if _is_batched(value) else value for k, value in self.kwargs.items()}
        return _Chunk(end, inputs, kwargs)

    def encode(self, model) -> dict[int | str, Tensor | None]:
        return _named(model(*self.inputs, **self.kwargs), self.rows.stop - self.rows.start)


class _RandomState:
    """The state of torch's generators on the CPU and on CUDA devices."""

    def __init__(self, devices: Sequence[torch.device]):
        self._cpu = torch.get_rng_state()
        self._cuda = [(torch.cuda.get_rng_state(device), device) for device in devices]

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for state, device in self._cuda:
            torch.cuda.set_rng_state(state, device)


def _split(inputs: tuple, kwargs: dict, chunk_size: int) -> list[_Chunk]:
    arguments = {**{f"input {i}": value for i, value in enumerate(inputs)}, **kwargs}
    rows = {name: len(value) for name, value in arguments.items() if _is_batched(value)}
    if not rows:
        raise ValueError("inputs: expected at least one tensor with the batch as first dimension")
    (first, size), *others = rows.items()
    for name, other in others:
        if other != size:
            raise ValueError(
                f"inputs: expected the same batch size in all tensors, got {size} rows in {first} "
                f"and {other} in {name}; bind tensors that are not a batch to the model beforehand"
            )
    for name in rows:
        if arguments[name].requires_grad and not arguments[name].is_leaf:
            raise ValueError(
                f"{name}: expected a leaf, got a result of other computations that require "
                "gradients; make them part of the model, or detach the input"
            )
    # A batch without rows still is one chunk: other ranks wait for its collectives.
    chunks = []
    for start in range(0, max(size, 1), chunk_size):
        part = slice(start, min(start + chunk_size, size))
        own = [value[part] if _is_batched(value) else value for value in inputs]
        named = {
            name: value[part] if _is_batched(value) else value for name, value in kwargs.items()
        }
        chunks.append(_Chunk(part, tuple(own), named))
    return chunks


def _is_batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _named(output: Any, rows: int) -> dict[int | str, Tensor | None]:
    """The tensors of a model's output by key or position."""
    if isinstance(output, Mapping):
        named = dict(output)
    elif isinstance(output, (tuple, list)):
        named = dict(enumerate(output))
    else:
        named = {0: output}
    for name, value in named.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"model: expected tensors or None as outputs, got {type(value).__name__} for "
                f"output {name!r}; let the model return a flat tuple or mapping of tensors"
            )
        if _is_batched(value) and len(value) != rows:
            raise ValueError(
                f"model: expected {rows} rows in output {name!r} for a chunk of {rows} rows, got "
                f"shape {list(value.shape)}; a number such as a temperature has no dimensions"
            )
    if all(value is None for value in named.values()):
        raise TypeError("model: expected at least one tensor as output, got none")
    return named


def _join(name: int | str, parts: list[Tensor | None]) -> Tensor | None:
    """One output of all chunks as a leaf for the loss."""
    joined = parts[-1]
    if joined is None:
        return None
    if joined.ndim:
        joined = torch.cat(parts)
    else:
        values = torch.stack(parts)
        # The compiler may round the same number differently for chunks of different sizes.
        slack = 4 * torch.finfo(values.dtype).eps if values.is_floating_point() else 0
        if not torch.allclose(values, joined.expand_as(values), slack, atol=0, equal_nan=True):
            raise ValueError(
                f"model: expected output {name!r}, which has no dimensions, to be the same for "
                f"every chunk, got {values.tolist()}; let the model return it by row and reduce it "
                "in the loss"
            )
    joined = joined.detach()
    return joined.requires_grad_(joined.is_floating_point() or joined.is_complex())


def _modules(model: Callable) -> list[nn.Module]:
    return list(model.modules()) if isinstance(model, nn.Module) else []


def _no_autocast(*tensors: Tensor) -> torch.autocast:
    return torch.autocast(tensors[0].device.type, enabled=False)


def _cuda_devices(modules: list[nn.Module], values: list) -> list[torch.device]:
    own = [tensor for module in modules for tensor in module.parameters(recurse=False)]
    devices = {v.device for v in [*values, *own] if isinstance(v, Tensor) and v.is_cuda}
    return sorted(devices, key=lambda device: device.index)


@contextlib.contextmanager
def no_sync(modules: list[nn.Module]) -> Iterator[None]:
    """Gradients stay on their rank inside, for DDP and FSDP2 anywhere in the model."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
            elif _is_sharded(module):
                module.set_requires_gradient_sync(False, recurse=False)
                stack.callback(module.set_requires_gradient_sync, True, recurse=False)
        yield


def _is_sharded(module: nn.Module) -> bool:
    # By its method, because importing FSDP to name its class takes long.
    return hasattr(module, "set_requires_gradient_sync")


def _groups(modules: list[nn.Module], loss: Callable) -> list[dist.ProcessGroup]:
    """The process groups that a step has collectives over, each once."""
    groups = [getattr(loss, "group", None)]
    for module in modules:
        if isinstance(module, DistributedDataParallel) and module.require_backward_grad_sync:
            groups.append(module.process_group)
    if (mesh := _mesh(modules)) is not None:
        groups += [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    distinct = {id(group): group for group in groups if isinstance(group, dist.ProcessGroup)}
    return [group for group in distinct.values() if group.size() > 1]


def _mesh(modules: list[nn.Module]):
    """The device mesh of an FSDP2 model, None for any other."""
    sharded = (p for m in modules if _is_sharded(m) for p in m.parameters())
    return next((p.device_mesh for p in sharded if hasattr(p, "device_mesh")), None)


def _most_chunks(modules: list[nn.Module], chunks: int) -> int:
    """The largest number of chunks of any rank of an FSDP2 model, else this rank's."""
    mesh = _mesh(modules)
    if mesh is None:
        return chunks
    most = torch.tensor(chunks, device=mesh.device_type)
    for dimension in range(mesh.ndim):
        dist.all_reduce(most, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
    return int(most)
