"""Two stand-ins for the CUDA passes on CPU tensors, and the means to put them in their place.

`PLAIN` is written in PyTorch from the contract in csrc/schema.cpp. `compiled` runs the kernels of
csrc/cuda/contrastive/contrastive.cu themselves, compiled for the CPU by the headers in
cuda_on_cpu/.
"""

import ctypes
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from fastvlp_tests.tolerance import assert_as_accurate

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def compile_library(source: str, folder: Path, *flags: str) -> ctypes.CDLL:
    """`source` (C++) as a shared library built by the host compiler."""
    text, library = folder / "source.cpp", folder / "library.so"
    text.write_text(source)
    command = ["c++", "-std=c++20", "-O2", "-shared", "-fPIC", *flags, str(text), "-o", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def compile_cuda(name: str, entry: str, folder: Path, *flags: str) -> ctypes.CDLL:
    """csrc/cuda/`name`/`name`.cu and cuda_on_cpu/`entry` as one shared library for the CPU."""
    home = CSRC / "cuda" / name
    source = (home / f"{name}.cu").read_text()
    launches = re.compile(r"(\w+(?:<[^<>;]+>)?)\s*<<<(.+?)>>>\s*\(", re.DOTALL)
    source, count = launches.subn(r"emulated::launch(\1, \2)(", source)
    assert count == source.count("emulated::launch") > 0 and "<<<" not in source
    torch_root = Path(torch.__file__).parent
    return compile_library(
        source + (HERE / "cuda_on_cpu" / entry).read_text(),
        folder,
        f"-I{HERE / 'cuda_on_cpu'}", f"-I{home}", f"-I{torch_root / 'include'}",
        "-Wno-unknown-pragmas", *flags,
    )  # fmt: skip


def compiled(folder: Path) -> SimpleNamespace:
    """The kernels of contrastive.cu; scratch memory begins as NaN."""
    library = compile_cuda("contrastive", "entry.cpp", folder)
    for name in ("run_statistics", "run_gradient", "run_sigmoid"):
        getattr(library, name).restype = ctypes.c_char_p

    def pointer(t):
        return ctypes.c_void_p(t.data_ptr() if t.numel() else None)

    def matrix(t, offset):
        assert t.dtype == torch.float32 and (t.shape[1] <= 1 or t.stride(1) == 1)
        return pointer(t), *map(ctypes.c_int64, (*t.shape, t.stride(0), offset))

    def output(t):
        stride = t.stride(0) if t.dim() == 2 else 0
        return pointer(t), ctypes.c_int64(stride), ELEMENTS[t.dtype]

    def statistics(similarities, scale, offset, row_negatives, positive, col_pairs):
        assert col_pairs.is_contiguous()
        vectors = map(pointer, (scale, row_negatives, positive, col_pairs))
        assert library.run_statistics(*matrix(similarities, offset), *vectors) is None

    def gradient(similarities, scale, row_lse, col_lse, positive_gradient, weights, offset, out):
        vectors = map(pointer, (scale, row_lse, col_lse, positive_gradient, weights))
        assert library.run_gradient(*matrix(similarities, offset), *vectors, *output(out)) is None

    def sigmoid(similarities, scale, bias, factor, offset, sums, out):
        assert sums.dtype == torch.float64
        error = library.run_sigmoid(
            *matrix(similarities, offset), pointer(scale), pointer(bias), ctypes.c_float(factor),
            pointer(sums), *output(out),
        )  # fmt: skip
        assert error is None

    return SimpleNamespace(statistics=statistics, gradient=gradient, sigmoid=sigmoid)


def floats(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float32)


def matrix(rows, cols, gap, *, deviation=1.0, dtype=torch.float32, seed=0):
    """[rows, cols] with rows of cols + gap elements, the gap full of NaN."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.full((rows, cols + gap), torch.nan, dtype=dtype)
    wide[:, :cols] = deviation * torch.randn(rows, cols, generator=g)
    return wide[:, :cols]


def is_positive(similarities: torch.Tensor, offset: int) -> torch.Tensor:
    """[M, N]: whether the element is its row's positive."""
    rows, cols = (torch.arange(size) for size in similarities.shape)
    return cols[None, :] == rows[:, None] + offset


def without_positives(z, offset):
    return torch.where(is_positive(z, offset), -torch.inf, z)


def assert_log_sum_exp(name, ours, eager, exact, floor):
    """Of nothing it is -inf."""
    assert torch.equal(ours == -torch.inf, exact == -torch.inf)
    some = exact > -torch.inf
    assert_as_accurate(name, ours[some], eager[some], exact[some], floor)


def _statistics(similarities, scale, offset, row_negatives, positive, col_pairs):
    z = scale * similarities
    pairs = is_positive(z, offset)
    positive.copy_(torch.where(pairs, z, 0).sum(1))
    z = torch.where(pairs, -torch.inf, z)
    if row_negatives.numel():
        row_negatives.copy_(z.double().logsumexp(1))
    if col_pairs.numel():
        largest = torch.maximum(col_pairs[0], z.amax(0))
        reference = torch.where(largest == -torch.inf, 0, largest)
        carried = col_pairs[1] * (col_pairs[0] - reference).exp()
        col_pairs.copy_(torch.stack((largest, carried + (z - reference).exp().sum(0))))


def _gradient(similarities, scale, row_lse, col_lse, positive_gradient, weights, offset, out):
    z = scale * similarities
    g = torch.zeros_like(z)
    if row_lse.numel():
        g = g + weights[0] * (z - row_lse[:, None]).exp()
    if col_lse.numel():
        g = g + weights[1] * (z - col_lse).exp()
    out.copy_(torch.where(is_positive(z, offset), positive_gradient[:, None], g))


def _sigmoid(similarities, scale, bias, factor, offset, sums, out):
    sign = torch.where(is_positive(similarities, offset), -1.0, 1.0)
    u = sign * (scale * similarities + bias)
    g = sign * u.sigmoid()
    sums += torch.stack([t.sum(dtype=torch.float64) for t in (torch.nn.functional.softplus(u), g)])
    if out.numel():
        out.copy_(factor * g)


PLAIN = SimpleNamespace(statistics=_statistics, gradient=_gradient, sigmoid=_sigmoid)


@contextmanager
def installed(passes: SimpleNamespace):
    """`passes` as the CPU kernels of the fastvlp::contrastive_cuda_* operators, and the matmuls
    of `wide_matmuls`."""
    with torch.library._scoped_library("fastvlp", "IMPL") as ours, wide_matmuls():
        for name, function in vars(passes).items():
            ours.impl(f"contrastive_cuda_{name}", function, "CPU")
        yield


@contextmanager
def wide_matmuls():
    """fp32 results of half-precision matmuls, which torch has for CUDA alone."""

    def matmul(a, b, out_dtype):
        return a.to(out_dtype) @ b.to(out_dtype)

    def mm(a, b, out_dtype, *, out):
        return out.copy_(matmul(a, b, out_dtype))

    def addmm(total, a, b, out_dtype, *, beta=1, alpha=1, out):
        assert beta == alpha == 1 and total.data_ptr() == out.data_ptr()
        return out.add_(matmul(a, b, out_dtype))

    with torch.library._scoped_library("aten", "IMPL") as aten:
        aten.impl("mm.dtype", matmul, "CPU")
        aten.impl("mm.dtype_out", mm, "CPU")
        aten.impl("addmm.dtype_out", addmm, "CPU")
        yield
