"""Which inputs the Triton kernels take, answered without importing Triton."""

import importlib.util

import torch

# Not relative: in a checkout others find this folder as the top-level package `kernels`.
from fastvlp._tracing import constant_result

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Elements. Rows that begin at multiples of it are loaded by whole vectors, as matrix units want
# them and as Triton's launcher specialises a kernel for.
ALIGNMENT = 16
# The widest head of the attention kernels: their tiles span a head.
LARGEST_HEAD = 128


def align(count: int) -> int:
    """`count` elements rounded up to a multiple of `ALIGNMENT`."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def storage_factor(dtype: torch.dtype) -> float:
    """What stored gradients are multiplied by: float16 would lose small ones to underflow."""
    return 2.0**14 if dtype == torch.float16 else 1.0


@constant_result
def interpreting() -> bool:
    """Whether Triton is installed and runs kernels in its interpreter (TRITON_INTERPRET=1)."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@constant_result
def device_reasons(device: torch.device) -> tuple[str, ...]:
    """Reasons why no Triton kernel can run on this device; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return ("Triton is not installed",)
    if interpreting():
        return ()
    if device.type != "cuda":
        return (f"Triton kernels run on CUDA devices, the inputs are on {device}",)
    if torch.version.cuda is None:
        return ("this PyTorch build has no CUDA; the Triton kernels are written for NVIDIA GPUs",)
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return (f"compute capability 8.0 or newer is needed, {device} has {major}.{minor}",)
    return ()


# Where Triton before 3.8 rounds the operands of float32 matmuls to TF32, whatever precision a
# kernel asks for: major compute capabilities.
ROUNDED_MATMULS = (10, 11)


def triton_before(major: int, minor: int) -> bool:
    """Whether the installed Triton is older than a version."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) < (major, minor)


def rounds_matmuls() -> bool:
    """Whether the installed Triton is one of those."""
    return triton_before(3, 8)


@constant_result
def matmul_reasons(device: torch.device) -> tuple[str, ...]:
    """Reasons why kernels that multiply float32 matrices cannot run on this device."""
    if reasons := device_reasons(device):
        return reasons
    if interpreting() or not rounds_matmuls():
        return ()
    if torch.cuda.get_device_capability(device)[0] not in ROUNDED_MATMULS:
        return ()
    return ("Triton before 3.8 rounds float32 matmuls to TF32 on this GPU; install a newer one",)


def _reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    return [*(matmul_reasons if dtype is torch.float32 else device_reasons)(device)]


def supported(x: torch.Tensor, y: torch.Tensor) -> list[str]:
    """Reasons why the contrastive Triton kernels cannot take `x` [M, D] and `y` [N, D].

    An empty list means they can. Every reason is one sentence for a person.
    """
    reasons = _reasons(x.device, x.dtype)
    if x.device != y.device:
        reasons.append(f"x is on {x.device} and y on {y.device}; both must be on one device")
    if x.dtype not in DTYPES:
        reasons.append(f"dtype {x.dtype} has no kernel; float32, bfloat16 and float16 have")
    if x.dtype != y.dtype:
        reasons.append(f"x is {x.dtype} and y {y.dtype}; both must have one dtype")
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        reasons.append(f"x and y must be [M, D] and [N, D], their shapes are {shapes}")
    elif x.shape[1] == 0:
        reasons.append("the embedding width D is 0")
    else:
        for name, tensor in (("x", x), ("y", y)):
            if tensor.shape[1] > 1 and tensor.stride(1) != 1:
                reasons.append(f"the last axis of {name} is not contiguous; call .contiguous()")
    return reasons


def attention_supported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[str]:
    """Reasons why the attention kernels cannot take q [total_q, H, d] and k, v [..., H, d]."""
    reasons = _reasons(q.device, q.dtype)
    if not q.device == k.device == v.device:
        reasons.append(
            f"q is on {q.device}, k on {k.device}, v on {v.device}; one device is needed"
        )
    if q.dtype not in DTYPES:
        reasons.append(f"dtype {q.dtype} has no kernel; float32, bfloat16 and float16 have")
    if not q.dtype == k.dtype == v.dtype:
        reasons.append(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; one dtype is needed")
    if q.dim() != 3 or k.dim() not in (3, 4) or k.shape != v.shape or k.shape[-2:] != q.shape[1:]:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        reasons.append(f"q must be [total_q, H, d], k and v [..., H, d]; the shapes are {shapes}")
    elif q.shape[-1] > LARGEST_HEAD:
        reasons.append(f"heads {q.shape[-1]} wide have no kernel; up to {LARGEST_HEAD} have")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            reasons.append(f"the last axis of {name} is not contiguous; call .contiguous()")
    return reasons


# A pair's matrix lives in the registers of one program: words and patches, each rounded up to a
# power of two, may have this many elements.
LARGEST_ALIGNMENT = 64 * 256


def alignment_supported(x: torch.Tensor, y: torch.Tensor) -> list[str]:
    """Reasons why the alignment kernels cannot take `x` [B, Lx, D] and `y` [B, Ly, D]."""
    reasons = _reasons(x.device, x.dtype)
    if x.dtype not in DTYPES or x.dtype != y.dtype:
        reasons.append(f"x is {x.dtype}, y {y.dtype}; one of float32, bfloat16, float16 is taken")
    if x.dim() == 3 and y.dim() == 3:
        words, patches = alignment_block(x.shape[1]), alignment_block(y.shape[1])
        if words * patches > LARGEST_ALIGNMENT:
            reasons.append(
                f"{x.shape[1]} words and {y.shape[1]} patches make a block of {words} x {patches}, "
                f"more than the {LARGEST_ALIGNMENT} elements that one program holds"
            )
    return reasons


def alignment_block(length: int) -> int:
    """The power of two, at least 16, that holds `length` positions."""
    return max(16, 1 << max(0, length - 1).bit_length())
