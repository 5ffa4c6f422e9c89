"""How many of torch's operators a call runs besides its kernels: most of a small call's time."""

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from fastvlp import ops


class Recorder(TorchDispatchMode):
    """Names of the operators that run inside of it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def leaf(*shape):
    return normalize(torch.randn(shape), dim=-1).requires_grad_()


def contrastive():
    tensors = leaf(8, 64), leaf(8, 64), torch.tensor(14.3, requires_grad=True)
    return lambda: ops.contrastive(*tensors)


def momentum_contrastive():
    tensors = leaf(4, 16), leaf(4, 16), *(leaf(4, 16).detach() for _ in range(4))
    temperature = torch.tensor(0.07, requires_grad=True)
    return lambda: ops.momentum_contrastive(*tensors, temperature).loss


def soft_cross_entropy():
    hidden, weight, labels = leaf(4, 16), leaf(50, 16), torch.randint(50, (4,))
    return lambda: ops.soft_cross_entropy(hidden, weight, None, labels)


def word_patch_alignment():
    words, patches = leaf(1, 4, 16), leaf(1, 6, 16)
    padding = [torch.zeros(1, size, dtype=torch.bool) for size in (4, 6)]
    return lambda: ops.word_patch_alignment(words, patches, *padding).sum()


# (forward, backward): the kernels, arguments that kernels take as tensors, and what autograd adds
# at any leaf. Looks at a value are not counted.
LIMITS = {
    contrastive: (1, 5),
    momentum_contrastive: (5, 7),
    soft_cross_entropy: (10, 7),
    word_patch_alignment: (2, 5),
}


@pytest.mark.parametrize("make", LIMITS, ids=lambda make: make.__name__)
def test_a_small_call_runs_few_operators(make):
    ops.release_workspace()  # of other shapes
    call = make()
    call().backward()
    with Recorder() as forward:
        loss = call()
    with Recorder() as backward:
        loss.backward()
    looks = "aten._local_scalar_dense.default"
    found = [name for name in forward.names if name != looks], backward.names
    assert any(name.startswith("fastvlp.") for name in forward.names)
    for names, limit in zip(found, LIMITS[make], strict=True):
        assert len(names) <= limit, names
