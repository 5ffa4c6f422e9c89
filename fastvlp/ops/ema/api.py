"""The momentum update of a whole model in one pass: exponential moving averages in place."""

from collections.abc import Sequence

import torch

from .. import compiled
from .._core.dispatch import choose, forced_backend, register_backends
from . import multi_tensor
from .memory import without_ties


def ema(
    momentum: Sequence[torch.Tensor],
    source: Sequence[torch.Tensor],
    decay: float | torch.Tensor,
    copies: Sequence[torch.Tensor] | None = None,
    *,
    check_finite: bool = False,
) -> torch.Tensor | None:
    """Moves every momentum tensor towards its source, in place.

        m_i <- d m_i + (1 - d) s_i        and, where wanted, copy_i <- m_i in a lower precision

    Source: He et al., "Momentum Contrast", arXiv 1911.05722, equation 2; Li et al., "Align before
    Fuse", arXiv 2107.07651, section 3.2 (momentum distillation, d = 0.995).

    Cost: 12 bytes of memory traffic for each float32 parameter, 2 more for a bfloat16 copy (a copy
    made afterwards costs 6 to 8), and 4 more to look for values that are not finite first. The
    addresses, shapes and strides of all tensors are validated once and kept; every later call with
    the same tensors is one parallel region on a CPU and one launch on a GPU. Storage never moves.

    Arithmetic is float32 whatever the dtypes, in the form m + (1 - d)(s - m) (mirrored below d =
    1/2), so that an average that equals its source stays equal to it. Nothing is differentiable.

    Args:
        momentum: float32, bfloat16 or float16 tensors (float64 through the reference), any
            shapes and strides; lower precision than float32 loses small steps. A tensor that
            stands twice (tied parameters) is updated once. DTensors are updated where they lie.
        source: one for each momentum tensor, of its shape, device and placements; any dtype.
        decay: d, a number between 0 and 1, or a float32 or float64 tensor of one value on the
            tensors' device, which is read there: nothing waits, and a captured graph or a
            compiled function follows it. Outside of [0, 1] a value on a GPU writes nothing.
        copies: None, or for each momentum tensor another one that receives its new value.
        check_finite: looks through all sources before anything is written, and writes nothing
            where one of them has a NaN or an infinity.

    Returns:
        With `check_finite` an int64 tensor of no dimensions: the last position in `source` that is
        not finite, or -1 after an update. On a GPU it is not read back. Otherwise None.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. Nothing was
            written then.
        RuntimeError: memory that is written overlaps other memory of the call, or FASTVLP_BACKEND
            forces an implementation that cannot run. Nothing was written.

    Examples:
        >>> import torch
        >>> from fastvlp.ops import ema
        >>> momentum, weights = [torch.zeros(2)], [torch.ones(2)]
        >>> ema(momentum, weights, 0.75)
        >>> momentum
        [tensor([0.2500, 0.2500])]
    """
    momentum, source, copies = list(momentum), list(source), list(copies or ())
    if not check_finite and _has_moved_again(momentum, source, decay, copies):
        return None
    return _check_and_move(momentum, source, decay, copies, check_finite)


@torch.no_grad()
def _check_and_move(momentum, source, decay, copies, check_finite):
    lists: dict[str, Sequence[torch.Tensor]] = {
        "momentum": momentum,
        "source": source,
        "copies": copies,
    }

    multi_tensor.check_lists(lists, optional=("copies",))
    if not momentum:
        return torch.tensor(-1) if check_finite else None
    decay_tensor, decay_value = multi_tensor.checked_decay(decay, momentum[0])
    native = choose("ema", momentum, source, decay, copies) == "native"
    found = (
        multi_tensor.last_exceeding(source, native=native, limit=_limit(source))
        if check_finite
        else None
    )
    parts = [multi_tensor.local(tensors) for tensors in (momentum, source, copies)]
    if native:
        torch.ops.fastvlp.ema_update(*parts, decay_tensor, decay_value, found)
        multi_tensor.bump_versions(parts[0], parts[2])
        return found
    if not torch.compiler.is_compiling():
        parts = without_ties(dict(zip(lists, parts, strict=True)), read=("source",))
    if found is None or found.item() < 0:
        ema_reference(parts[0], parts[1], decay, parts[2])
    return found


_PLAIN = {torch.Tensor, torch.nn.Parameter}


def _has_moved_again(momentum, source, decay, copies) -> bool:
    """Moves tensors on the CPU that an earlier call was given and that lie where they lay then.

    All that is checked is whether they do: looking at each of them in Python takes longer than
    moving the weights of a small model.
    """
    if not (
        momentum
        and type(decay) is float
        and 0.0 <= decay <= 1.0
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and _PLAIN.issuperset(map(type, (*momentum, *source, *copies)))
        and momentum[0].is_cpu
        and forced_backend("ema") in (None, "native")
        and not compiled.load()
    ):
        return False
    # The operator itself refuses an instruction set that the CPU does not have.
    with torch._C._AutoDispatchBelowAutograd():
        if not torch.ops.fastvlp.ema_update_again(momentum, source, copies, decay):
            return False
    torch.autograd.graph.increment_version([*momentum, *copies])
    return True


def _limit(tensors):
    wide = any(t.dtype == torch.float64 for t in tensors)
    return multi_tensor.finite_limit(torch.float64 if wide else torch.float32)


@torch.no_grad()
def ema_reference(
    momentum: Sequence[torch.Tensor],
    source: Sequence[torch.Tensor],
    decay: float | torch.Tensor,
    copies: Sequence[torch.Tensor] | None = None,
) -> None:
    """The definition of `ema`, for any floating dtype; tied tensors must stand once."""
    decay = float(decay)
    for i, (m, s) in enumerate(zip(momentum, source, strict=True)):
        wide = torch.float64 if m.dtype == torch.float64 else torch.float32
        value, target = m.to(wide), s.to(wide)
        if decay == 0.0:
            value = target
        elif decay < 1.0:  # equal infinities, whose difference is NaN, stay
            value = torch.where(value == target, value, value.lerp(target, 1.0 - decay))
        m.copy_(value)
        if copies:
            copies[i].copy_(value)


def _native_reasons(momentum, source, decay=None, copies=None, **_):
    return multi_tensor.native_reasons(momentum, source, copies)


def _no_reasons(*_, **__):
    return []


multi_tensor.register_operators()
register_backends(
    "ema",
    example={"momentum": [(8,)], "source": [(8,)]},
    native=_native_reasons,
    reference=_no_reasons,
)
