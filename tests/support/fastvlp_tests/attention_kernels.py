"""Problems for the attention kernels, and their check against the float64 definition.

`run_kernel_with({attribute: value}, module, function, ...)` is where and how they run.
"""

from dataclasses import dataclass

import torch

from fastvlp.ops.cross_attention import cross_attention_reference
from fastvlp_tests.tolerance import assert_as_accurate, epsilon

SEED = -(3 << 40) - 12345


@dataclass(frozen=True)
class Problem:
    """q, k, v, the gradient of the output, and the other arguments of the operator."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    cu_q: torch.Tensor
    cu_k: torch.Tensor | None
    key_mask: torch.Tensor | None = None
    causal: bool = False
    scale: float = 0.125
    dropout_p: float = 0.0

    @property
    def options(self) -> dict:
        longest_k = self.k.shape[1] if self.cu_k is None else int(self.cu_k.diff().max())
        return {
            "scale": self.scale, "dropout_p": self.dropout_p, "causal": self.causal,
            "max_seqlen_q": int(self.cu_q.diff().max()), "max_seqlen_k": longest_k,
        }  # fmt: skip

    @property
    def inputs(self) -> tuple:
        seed = torch.tensor([SEED], device=self.q.device)
        return self.q, self.k, self.v, self.cu_q, self.cu_k, self.key_mask, seed


def offsets(lengths, device, dtype=torch.int32):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def rows(shape, dtype, device, generator, gap=0, width=1.0):
    """Normal numbers, last axis contiguous; `gap` leaves NaN between the rows in memory."""
    wide = torch.full((*shape[:-1], shape[-1] + gap), torch.nan, dtype=dtype)
    wide[..., : shape[-1]] = width * torch.randn(shape, generator=generator, dtype=torch.float64)
    return wide.to(device)[..., : shape[-1]]


def draw(
    queries, keys, device, *, heads=1, dim=32, dtype=torch.float32, packed=False, masked=False,
    gap=0, seed=0, **options,
):  # fmt: skip
    """`queries` rows per segment; `keys` of each segment where packed, else of all."""
    g = torch.Generator().manual_seed(seed)
    key_shape = (sum(keys),) if packed else (len(queries), keys)
    k, v = (rows((*key_shape, heads, dim), dtype, device, g, gap) for _ in range(2))
    q, grad = (rows((sum(queries), heads, dim), dtype, device, g, gap) for _ in range(2))
    mask = torch.rand(key_shape, generator=g).to(device) < 0.6 if masked else None
    return Problem(
        q, k, v, grad, offsets(queries, device), offsets(keys, device, torch.int64)
        if packed else None, mask, **options,
    )  # fmt: skip


def definition(problem, dtype):
    """Output and gradients by autograd through the reference, at `dtype`."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (problem.q, problem.k, problem.v))
    out = cross_attention_reference(
        q, k, v, problem.cu_q, problem.cu_k, key_mask=problem.key_mask, causal=problem.causal,
        scale=problem.scale, dropout_p=problem.dropout_p, dropout_seed=SEED,
    )  # fmt: skip
    out.backward(problem.grad.to(dtype))
    return [out.detach()] + [torch.zeros_like(t) if t.grad is None else t.grad for t in (q, k, v)]


def run(run_kernel_with, problem, overrides):
    out, statistics = run_kernel_with(
        {}, "cross_attention.forward", "cross_attention_forward", *problem.inputs, **problem.options
    )
    q, k, v, *rest = problem.inputs
    gradients = run_kernel_with(
        overrides, "cross_attention.backward", "cross_attention_backward",
        problem.grad, q, k, v, out, statistics, *rest, **problem.options,
    )  # fmt: skip
    return [out, *gradients], statistics


def rounding(problem, out):
    """What rounding costs where terms cancel to less than their size; `out` is the exact output.

    Logits and sums are float32; dS is a difference from dO * O, of which O has the dtype of q.
    """
    tensors = (problem.q, problem.k, problem.v, problem.grad)
    q, k, v, grad = (torch.nan_to_num(t.double()).norm(dim=-1) for t in tensors)
    largest_q, largest_k, largest_v = (t.max().item() if t.numel() else 0.0 for t in (q, k, v))
    unit = epsilon(torch.float32) * (1 + problem.scale * largest_q * largest_k)
    terms = unit * grad.norm().item() * largest_v
    terms += epsilon(problem.q.dtype) * (problem.grad.double() * out).norm().item()
    return {
        "out": unit * v.norm().item(),
        "dv": unit * grad.norm().item(),
        "dq": terms * problem.scale * largest_k,
        "dk": terms * problem.scale * largest_q,
    }


def check(run_kernel_with, problem, overrides):
    ours, statistics = run(run_kernel_with, problem, overrides)
    exact, eager = definition(problem, torch.float64), definition(problem, problem.q.dtype)
    cancelled = rounding(problem, exact[0])
    for name, our, near, true in zip(("out", "dq", "dk", "dv"), ours, eager, exact, strict=True):
        assert our.dtype == problem.q.dtype
        floor = epsilon(our.dtype) * true.norm().item() + cancelled[name]
        assert_as_accurate(name, our, near, true, floor)
    return ours, statistics


def check_coarse_logits(run_kernel_with, device, dtype, size, scale, overrides):
    """Logits of about `size`, of which the largest comes twice: its weights are halves."""
    problem = draw([40, 3], 90, device, heads=2, dtype=dtype, masked=True, scale=scale)
    norm = (size / 32**0.5) ** 0.5
    for t, factor in ((problem.q, norm), (problem.k, norm), (problem.v, 1e-2)):
        t *= factor
    problem.k[:, 45:] = problem.k[:, :45]  # the largest logit comes twice, or once where masked
    ours, _ = run(run_kernel_with, problem, overrides)
    exact, eager = definition(problem, torch.float64), definition(problem, dtype)
    q, k, v = (t.double().norm(dim=-1).max() for t in (problem.q, problem.k, problem.v))
    # Gradients of logits are differences of terms of this size.
    terms = epsilon(dtype) * problem.grad.double().norm() * v
    floors = 0.0, terms * k, terms * q, 0.0
    for name, *three, floor in zip(("out", "dq", "dk", "dv"), ours, eager, exact, floors,
                                   strict=True):  # fmt: skip
        assert_as_accurate(name, *three, epsilon(dtype) * three[2].norm().item() + float(floor))
