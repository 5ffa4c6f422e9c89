"""Float32 matmuls on bfloat16 AMX tiles, as exact as a float32 matmul (bf16x3 emulation)."""

import torch

from ..._tracing import constant_result
from .. import compiled
from .._core.backends import reference_reasons
from .._core.checks import check_same_kind
from .._core.dispatch import choose, forced_backend, register_backends
from .._core.implement import without_autocast

# Multiply-adds from which on splitting the operands into bf16 parts pays.
LEAST_WORK = 1 << 24
# Rows or columns that share the cost of splitting the other operand.
LEAST_SIDE = 160
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def matmul(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b + bias.

        C = A B + bias

    On a CPU with AMX tiles of bfloat16 a float32 is split into three bf16 parts whose sum it is
    (split fp32, bf16x3), and the six largest of the nine products of such parts are added up in
    float32; what is left out is below 2^-25 of each product, half of the rounding of a float32.
    Sums run over at most 768 of K before they are added to C. The error is about that of `torch.mm`
    or less, the rate 1.2 to 1.5 times its. Elsewhere, for other dtypes, for small matrices and
    where ``torch.set_float32_matmul_precision("medium")`` asks for less, this is `torch.mm`.

    Source: Henry, Tang, Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For
    Higher-Precision Computations", arXiv 1904.06376, section III.

    Cost for A [m, k] and B [k, n]: 12 m n k bfloat16 FLOP; beyond the result a few MB for each
    thread. Parts below 2^-126 count as zero: values below 2^-110 lose their last bits.

    Args:
        a: [m, k], any floating dtype and strides.
        b: [k, n], same dtype and device.
        bias: [n], same dtype and device.

    Returns:
        [m, n], differentiable with respect to all three any number of times.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: FASTVLP_BACKEND forces an implementation that cannot run.

    Examples:
        >>> import torch
        >>> from fastvlp.ops import matmul
        >>> matmul(torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2))
        tensor([[2., 3.],
                [4., 5.]])
    """
    if _is_torchs(a, b, bias):
        return matmul_reference(a, b, bias)
    _check_inputs(a, b, bias)
    if choose("matmul", a, b, bias) == "reference":
        return without_autocast(matmul_reference)(a, b, bias)
    return _native_matmul(a, b, bias)


def matmul_reference(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition of `matmul`: any device, any floating dtype."""
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def _is_torchs(a, b, bias) -> bool:
    """Whether these are small matrices with nothing to refuse, of which torch's matmul takes less
    time than to find that out by way of all checks and backends."""
    if not (
        type(a) in _PLAIN
        and type(b) in _PLAIN
        and a.is_cpu
        and b.is_cpu
        and a.dtype == b.dtype == torch.float32
        and a.dim() == b.dim() == 2
    ):
        return False
    (m, k), (rows, n) = a.shape, b.shape
    return (
        k == rows
        and not _is_large(m, n, k)
        and (bias is None or _is_row(bias, n))
        and not torch.is_autocast_enabled("cpu")
        and forced_backend("matmul") in (None, "reference")
        and compiled.instruction_set_fault() is None
    )


def _is_row(bias, count: int) -> bool:
    return (
        type(bias) in _PLAIN
        and bias.is_cpu
        and bias.dtype == torch.float32
        and bias.shape == (count,)
    )


def unchecked_matmul(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`matmul` for callers inside of the library, whose arguments are known to fit."""
    if runs_natively(a, b):
        return _native_matmul(a, b, bias)
    return matmul_reference(a, b, bias)


def runs_natively(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `unchecked_matmul` of these would use AMX tiles."""
    if a.dtype != torch.float32 or b.dtype != torch.float32 or a.device.type != "cpu":
        return False
    return _is_large(a.shape[0], b.shape[1], a.shape[1]) and _uses_amx()


def takes_rows(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """The same of the rows of x [.., k] and the columns of weight [n, k], transposed."""
    return (
        x.is_cpu
        and weight.dim() == 2
        and x.numel() >= LEAST_SIDE * weight.shape[1]
        and x.dim() > 0
        and runs_natively(x.reshape(-1, x.shape[-1]), weight.T)
    )


def _is_large(m: int, n: int, k: int) -> bool:
    return m >= LEAST_SIDE and n >= LEAST_SIDE and m * n * k >= LEAST_WORK


@constant_result
def _uses_amx() -> bool:
    return not _cpu_reasons() and forced_backend("matmul") in (None, "native")


@constant_result
def _cpu_reasons() -> list[str]:
    reasons = list(compiled.load())
    if not reasons and not torch.ops.fastvlp.matmul_available():
        reasons.append(
            "the CPU or FASTVLP_CPU_ISA has no AMX tiles of bfloat16; torch.mm is as fast"
        )
    if torch.get_float32_matmul_precision() == "medium":
        reasons.append('torch.set_float32_matmul_precision("medium") asks for less precision')
    return reasons


def _native_matmul(a, b, bias):
    return torch.ops.fastvlp.matmul(one_unit_stride(a), one_unit_stride(b), _contiguous(bias))


def one_unit_stride(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only where neither of its two axes is contiguous."""
    if x.stride(1) == 1 or x.stride(0) == 1 or 1 in x.shape:
        return x
    return x.contiguous()


def _contiguous(bias):
    return None if bias is None else bias.contiguous()


def _check_inputs(a, b, bias) -> None:
    for name, t, dims in (("a", a, 2), ("b", b, 2), ("bias", bias, 1)):
        if name == "bias" and t is None:
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {t.dtype}")
        if t.dim() != dims:
            raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(t.shape)}")
    if b.shape[0] != a.shape[1]:
        raise ValueError(
            f"b: expected {a.shape[1]} rows, as many as a has columns, got shape {tuple(b.shape)}"
        )
    check_same_kind("b", b, "a", a)
    if bias is not None:
        if bias.shape[0] != b.shape[1]:
            raise ValueError(
                f"bias: expected {b.shape[1]} values, as many as b has columns, got {bias.shape[0]}"
            )
        check_same_kind("bias", bias, "a", a)


def _native_reasons(a, b, bias=None) -> list[str]:
    reasons = list(_cpu_reasons())
    if a.device.type != "cpu":
        reasons.append(f"the native kernels run on CPUs, the matrices are on {a.device}")
    if a.dtype != torch.float32:
        reasons.append(f"dtype {a.dtype} has no kernel; float32 has")
    if not _is_large(a.shape[0], b.shape[1], a.shape[1]) and forced_backend("matmul") != "native":
        reasons.append("torch.mm is faster for matrices as small as these")
    return reasons


def _fake(a, b, bias):
    return a.new_empty(a.shape[0], b.shape[1])


def _setup(ctx, inputs, output):
    a, b, bias = inputs
    ctx.save_for_backward(a, b)
    ctx.has_bias = bias is not None


def _backward(ctx, gradient):
    a, b = ctx.saved_tensors
    da = unchecked_matmul(gradient, b.T) if ctx.needs_input_grad[0] else None
    db = None
    if ctx.needs_input_grad[1]:
        # In the order in which b lies in memory: of F.linear that is the weight's.
        if b.stride(1) == 1:
            db = unchecked_matmul(a.T, gradient)
        else:
            db = unchecked_matmul(gradient.T, a).T
    dbias = gradient.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
    return da, db, dbias


def _register_operators() -> None:
    """Called once when this module is imported; does nothing where there are no schemas."""
    if compiled.missing_schemas():
        return
    torch.library.register_fake("fastvlp::matmul", _fake)
    torch.library.register_autograd("fastvlp::matmul", _backward, setup_context=_setup)


register_backends(
    "matmul",
    example={"a": (256, 256), "b": (256, 256)},
    native=_native_reasons,
    reference=reference_reasons,
)
_register_operators()
