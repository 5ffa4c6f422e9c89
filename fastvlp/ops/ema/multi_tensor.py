"""What the multi-tensor operators share: their lists, the decay, and the search for NaN.

Lists are checked before an operator is called; lists in order cost one look at each tensor. The
compiled operators check memory (overlaps, tied tensors) themselves before they write anything.
"""

import math
from collections.abc import Sequence
from itertools import chain
from numbers import Real

import torch
import torch.distributed as dist

from .. import compiled
from .._core.checks import dtensor_classes

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = torch.finfo(torch.float32).max


def check_lists(lists: dict[str, Sequence[torch.Tensor]], optional: tuple[str, ...]) -> None:
    """Raises TypeError or ValueError unless the lists go together; the first sets the measure."""
    given = [tensors for name, tensors in lists.items() if tensors or name not in optional]
    if not _plainly_alike(given):
        _check_each(lists, optional)


def _plainly_alike(lists: list[Sequence[torch.Tensor]]) -> bool:
    """Whether these are plain tensors in order, of one device; quick enough for every step."""
    tensors = list(chain(*lists))
    classes = {type(t) for t in tensors}
    sharded = dtensor_classes()
    if not all(issubclass(c, torch.Tensor) and not issubclass(c, sharded) for c in classes):
        return False
    if len({t.device for t in tensors}) > 1 or {t.layout for t in tensors} - {torch.strided}:
        return False
    if not all(dtype.is_floating_point for dtype in {t.dtype for t in tensors}):
        return False
    shapes = [t.shape for t in lists[0]]
    return all([t.shape for t in tensors] == shapes for tensors in lists[1:])


def _check_each(lists: dict[str, Sequence[torch.Tensor]], optional: tuple[str, ...]) -> None:
    first_name, first = next(iter(lists.items()))
    for name, tensors in lists.items():
        if name in optional and not tensors:
            continue
        if len(tensors) != len(first):
            raise ValueError(
                f"{name}: expected {len(first)} tensors as in {first_name}, got {len(tensors)}"
            )
        for i, (t, model) in enumerate(zip(tensors, first, strict=True)):
            _check_tensor(f"{name}[{i}]", t, f"{first_name}[{i}]", model)


def _check_tensor(name: str, t: torch.Tensor, model_name: str, model: torch.Tensor) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {t.layout}")
    if not t.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {t.dtype}; copy it instead")
    if not isinstance(model, torch.Tensor):
        return
    if t.shape != model.shape:
        raise ValueError(
            f"{name}: expected the shape of {model_name}, {tuple(model.shape)}, got "
            f"{tuple(t.shape)}"
        )
    if t.device != model.device:
        raise ValueError(
            f"{name}: expected the device of {model_name}, {model.device}, got {t.device}; move it"
        )
    is_dtensor, model_is_dtensor = (isinstance(each, dtensor_classes()) for each in (t, model))
    if is_dtensor != model_is_dtensor:
        kinds = ("a DTensor", "a plain tensor")
        wanted, got = kinds if model_is_dtensor else kinds[::-1]
        raise TypeError(f"{name}: expected {wanted} as {model_name}, got {got}; shard both alike")
    if is_dtensor:
        if t.placements != model.placements or t.device_mesh != model.device_mesh:
            raise ValueError(
                f"{name}: expected the mesh and placements of {model_name}, {model.device_mesh} "
                f"{model.placements}, got {t.device_mesh} {t.placements}; redistribute one of them"
            )
        if any(place.is_partial() for place in t.placements):
            raise ValueError(
                f"{name}: expected shards or replicas, got placements {t.placements}; "
                "redistribute it"
            )


def local(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, DTensors by the part that lies here."""
    classes = dtensor_classes()
    return [t.to_local() if isinstance(t, classes) else t for t in tensors]


def checked_decay(decay: float | torch.Tensor, like: torch.Tensor) -> tuple:
    """`decay` as the operators take it: (tensor or None, number)."""
    if not isinstance(decay, torch.Tensor):
        if not isinstance(decay, Real):
            raise TypeError(f"decay: expected a number or a tensor, got {type(decay).__name__}")
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay: expected a value between 0 and 1, got {decay!r}")
        return None, float(decay)
    if decay.numel() != 1:
        raise ValueError(f"decay: expected one value, got shape {tuple(decay.shape)}")
    if decay.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"decay: expected float32 or float64, got {decay.dtype}; cast it")
    if decay.device.type == "cpu" and not torch.compiler.is_compiling():
        value = decay.item()
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"decay: expected a value between 0 and 1, got {value!r}")
        return (decay, 0.0) if like.device.type == "cpu" else (None, value)
    if decay.device != like.device:
        raise ValueError(
            f"decay: expected a number or a tensor on {like.device}, got one on {decay.device}"
        )
    return decay, 0.0


def checked_number(name: str, value: float | torch.Tensor) -> float:
    """The value of a number, or of a tensor of one.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return float(value)


def check_adamw(lr, betas, eps, weight_decay) -> None:
    """Raises TypeError or ValueError, naming it, where a setting of AdamW is none."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0.0 <= checked_number(name, value) < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
    if not isinstance(betas, Sequence) or isinstance(betas, str):
        raise TypeError(f"betas: expected two numbers, got {betas!r}")
    if len(betas) != 2:
        raise ValueError(f"betas: expected two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        if not 0.0 <= checked_number(f"betas[{i}]", beta) < 1.0:
            raise ValueError(f"betas[{i}]: expected a value in [0, 1), got {beta!r}")


def native_reasons(*lists: Sequence[torch.Tensor] | None) -> list[str]:
    """Why the compiled kernels, CPU or CUDA, cannot take these lists."""
    tensors = [t for tensors in lists if tensors is not None for t in tensors]
    device = tensors[0].device.type if tensors else "cpu"
    if device not in ("cpu", "cuda"):
        return [f"the native kernels run on CPU and CUDA devices, the tensors are on {device}"]
    reasons = list(compiled.load_cuda() if device == "cuda" else compiled.load())
    for dtype in sorted({t.dtype for t in tensors} - set(NATIVE_DTYPES), key=str):
        reasons.append(f"dtype {dtype} has no kernel; float32, bfloat16, float16 have")
    return reasons


def last_exceeding(
    tensors: Sequence[torch.Tensor], limit: float = LARGEST, *, native: bool = True
) -> torch.Tensor:
    """int64 []: the last position whose tensor has a NaN or a magnitude above `limit`, else -1.

    Nothing is read back from a device. Of DTensors every rank looks at its own part, and all ranks
    of their meshes get the same answer.
    """
    parts = local(tensors)
    if native:
        found = torch.ops.fastvlp.last_exceeding(parts, limit)
    else:
        # Python numbers: a CPU tensor can hold them, and the reference may wait for its device.
        bad = [i for i, t in enumerate(parts) if not (t.abs() <= limit).all()]
        found = torch.tensor(bad[-1] if bad else -1, device=parts[0].device)
    meshes = {t.device_mesh for t in tensors if isinstance(t, dtensor_classes())}
    for mesh in sorted(meshes, key=lambda mesh: (mesh.ndim, tuple(mesh.mesh.flatten().tolist()))):
        for dim in range(mesh.ndim):
            dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.get_group(dim))
    return found


def finite_limit(dtype: torch.dtype) -> float:
    """The largest finite magnitude of the arithmetic on this dtype."""
    return torch.finfo(torch.float64).max if dtype == torch.float64 else LARGEST


def square_limit() -> float:
    """The largest magnitude whose square is a finite float32."""
    return math.sqrt(LARGEST)


def bump_versions(*lists: Sequence[torch.Tensor]) -> None:
    """Tells autograd that the tensors were written, as PyTorch's own in-place operators do."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for tensors in lists for t in tensors])


def register_operators() -> None:
    """Shapes for tracing; called once when `fastvlp.ops` is imported."""
    if compiled.missing_schemas():
        return
    for name in ("ema_update", "adamw_ema"):
        torch.library.register_fake(f"fastvlp::{name}", lambda *_: None)
    torch.library.register_fake("fastvlp::ema_update_again", lambda *_: False)
    torch.library.register_fake(
        "fastvlp::last_exceeding",
        lambda tensors, limit: tensors[0].new_empty((), dtype=torch.int64),
    )
