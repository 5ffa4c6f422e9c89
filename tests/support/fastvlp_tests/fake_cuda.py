"""CUDA tensors without a GPU: operators run on fake ones, which have all but values.

`gpu()` makes them possible, `CALLS` has a call of every public operator, `Implementations` lets the
implementations for CUDA tensors run, all but the kernels themselves, and `differentiated()` runs
backward passes right after their forward passes: autograd's engine itself refuses to work for a
device that is not there.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastvlp import ops
from fastvlp.ops._core.implement import IMPLEMENTED
from fastvlp.ops.contrastive import cuda

CAPABILITY = (9, 0)


@contextmanager
def gpu() -> Iterator[FakeTensorMode]:
    """Fake CUDA tensors, and a GPU of compute capability 9.0 that runs every kernel there is."""
    with (
        mock.patch("torch.cuda.get_device_capability", lambda *_: CAPABILITY),
        mock.patch("fastvlp.kernels._core.launch._multiprocessors", lambda _: 132),
        mock.patch("fastvlp.kernels._core.launch.current_device", lambda: 0),
        mock.patch("torch.cuda.device", lambda *_: nullcontext()),
        mock.patch("triton.runtime.jit.JITFunction.run", lambda *_, **__: None),
        mock.patch.object(torch.version, "cuda", torch.version.cuda or "13.0"),
        mock.patch.object(cuda, "_unavailable", lambda _: ()),
        FakeTensorMode() as mode,
    ):
        yield mode


class Implementations(TorchDispatchMode):
    """Runs the operators' own implementations for CUDA tensors; inside of `gpu()`.

    Attributes:
        ran: names of the operators that were run so.
        autocast: whether autocast was on, for each function of torch that they called.
        waits: what the host had to wait for the device for, or the device for the host.
    """

    def __init__(self):
        super().__init__()
        self.ran: list[str] = []
        self.autocast: list[bool] = []
        self.waits: list[str] = []
        self._is_outside = torch.is_autocast_enabled("cuda")
        self._depth = 0  # an operator's own functions are looked at by entering it once more
        self._patches = [
            mock.patch.object(owner, "synchronize", lambda *_, n=name: self.waits.append(n))
            for name, owner in WAITING.items()
        ]

    def __enter__(self):
        if not self._depth:
            for patch in self._patches:
                patch.start()
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *exception):
        self._depth -= 1
        if not self._depth:
            for patch in self._patches:
                patch.stop()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("fastvlp::")
        if name in IMPLEMENTED["CUDA"]:
            self.ran.append(name)
            key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
            with self, _AutocastSeen(self.autocast):
                # A dispatch mode is called with autocast off, an implementation as it was outside.
                torch.set_autocast_enabled("cuda", self._is_outside)
                return function.redispatch(key, *args, **kwargs or {})
        self._look_for_waits(name, args, kwargs or {})
        return function(*args, **kwargs or {})

    def _look_for_waits(self, name: str, args, kwargs) -> None:
        devices = [t.device.type for t in args if isinstance(t, torch.Tensor)]
        if kwargs.get("pin_memory"):
            self.waits.append(f"{name} in pinned memory")
        if name in WAITS or (name == "aten::lift_fresh" and "cuda" in devices):
            self.waits.append(name)
        elif name in COPIES:
            devices.append(torch.device(kwargs.get("device") or devices[0]).type)
            if len(set(devices)) > 1:
                self.waits.append(f"{name} {devices}")
        elif name.startswith("aten::index"):
            taken = [t for index in args[1:2] if isinstance(index, list) for t in index]
            if any(t is not None and t.dtype == torch.bool for t in taken):
                self.waits.append(f"{name} by a mask")


class _AutocastSeen(TorchFunctionMode):
    """Notes whether autocast is on at every call of torch."""

    def __init__(self, seen: list[bool]):
        super().__init__()
        self._seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self._seen.append(torch.is_autocast_enabled("cuda"))
        return function(*args, **kwargs or {})


# Operators whose results the host reads or whose sizes depend on values. (What lift_fresh gets on
# a GPU has come out of torch.tensor, which copies it from memory that is not pinned.)
WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique2",
    "aten::is_nonzero", "aten::equal", "aten::_pin_memory", "aten::pin_memory",
}  # fmt: skip
COPIES = {"aten::_to_copy", "aten::copy_"}
# What has a method `synchronize`, by which the host waits.
WAITING = {
    "synchronize": torch.cuda,
    "Event.synchronize": torch.cuda.Event,
    "Stream.synchronize": torch.cuda.Stream,
}


class _Context(SimpleNamespace):
    """What forward and backward of an autograd function see of `ctx`."""

    saved_tensors = ()

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_):
        pass

    def set_materialize_grads(self, _):
        pass


@contextmanager
def differentiated() -> Iterator[None]:
    """Each `apply` of an autograd function runs its backward pass as well, but no second one.

    The upstream gradient is that of the first output.
    """

    def apply(function, *inputs):
        needed = [torch.is_grad_enabled() and _has_gradient(t) for t in inputs]
        ctx = _Context(needs_input_grad=needed)
        with torch.no_grad():
            if function.setup_context is torch.autograd.Function.setup_context:
                outputs = function.forward(ctx, *inputs)
            else:
                outputs = function.forward(*inputs)
                function.setup_context(ctx, inputs, outputs)
            if any(needed):
                first, *others = outputs if isinstance(outputs, tuple) else (outputs,)
                function.backward(ctx, torch.ones_like(first), *[None] * len(others))
        return outputs

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)):
        yield


def _has_gradient(value) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def floats(*shape, dtype=torch.bfloat16, gradient=False):
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=gradient)


def integers(*shape):
    return torch.empty(shape, dtype=torch.int64, device="cuda")


def masks(*shape):
    return torch.empty(shape, dtype=torch.bool, device="cuda")


def leaf(*shape, dtype=torch.bfloat16):
    return floats(*shape, dtype=dtype, gradient=True)


def scalar(gradient=True):
    return floats(dtype=torch.float32, gradient=gradient)


# --- a call of each operator on rows of some number, as function(tensors) and tensors -------------


def contrastive(n, dtype):
    return ops.contrastive, (leaf(n, 24, dtype=dtype), leaf(n, 24, dtype=dtype), scalar())


def sigmoid(n, dtype):
    return ops.sigmoid_contrastive, (
        leaf(n, 24, dtype=dtype), leaf(n, 24, dtype=dtype), scalar(), scalar()
    )  # fmt: skip


def sigmoid_with_numbers(n, dtype):
    features = leaf(n, 24, dtype=dtype), leaf(n, 24, dtype=dtype)
    return (lambda x, y: ops.sigmoid_contrastive(x, y, 10.0, -10.0)), features


def momentum(n, dtype):
    batch = [floats(n, 24, dtype=dtype) for _ in range(2)]
    queues = [floats(n + 70, 24, dtype=dtype) for _ in range(2)]
    students = [leaf(n, 24, dtype=dtype) for _ in range(2)]
    ids = integers(n), integers(n + 70)

    def call(*tensors):
        *features, temperature, ids, queue_ids = tensors
        return ops.momentum_contrastive(*features, temperature, 0.4, ids=ids, queue_ids=queue_ids)

    return call, (*students, *batch, *queues, scalar(), *ids)


def momentum_with_numbers(n, dtype):
    features = [leaf(n, 24, dtype=dtype) for _ in range(2)]
    others = [floats(n, 24, dtype=dtype) for _ in range(4)]

    def call(*tensors):
        return ops.momentum_contrastive(*tensors, 0.07, 0.4, seed=3, queue_length=5)

    return call, (*features, *others)


def cross_attention(n, dtype):
    q, k, v = leaf(n, 2, 16, dtype=dtype), *(leaf(3, 20, 2, 16, dtype=dtype) for _ in range(2))

    def call(q, k, v, starts, mask):
        return ops.cross_attention(q, k, v, starts, key_mask=mask, dropout_p=0.1, max_seqlen_q=n)

    return call, (q, k, v, integers(4), masks(3, 20))


def packed_attention(n, dtype):
    rows = [leaf(n, 2, 16, dtype=dtype) for _ in range(3)]

    def call(q, k, v, starts):
        bounds = {"max_seqlen_q": n, "max_seqlen_k": n}
        return ops.cross_attention(q, k, v, starts, starts, causal=True, **bounds)

    return call, (*rows, integers(4))


def attention_without_bounds(n, dtype):
    rows = [leaf(n, 2, 16, dtype=dtype) for _ in range(3)]

    def call(q, k, v, starts):
        return ops.cross_attention(q, k, v, starts, starts)

    return call, (*rows, integers(4))


def _head(n, dtype):
    single = {"dtype": torch.float32}  # master weights, as autocast finds them
    return leaf(n, 16, dtype=dtype), leaf(50, 16, **single), leaf(50, **single)


def _soft_cross_entropy(n, dtype, **options):
    teacher = [floats(*t.shape, dtype=t.dtype) for t in _head(n, dtype)]

    def call(hidden, weight, bias, labels, *teacher):
        names = ("teacher_hidden", "teacher_weight", "teacher_bias")
        given = dict(zip(names, teacher, strict=True))
        return ops.soft_cross_entropy(hidden, weight, bias, labels, alpha=0.4, **given, **options)

    return call, (*_head(n, dtype), integers(n), *teacher)


def soft_cross_entropy(n, dtype):
    return _soft_cross_entropy(n, dtype, max_rows=n)


def soft_cross_entropy_of_some_rows(n, dtype):
    return _soft_cross_entropy(n, dtype, max_rows=n // 2, reduction="sum")


def soft_cross_entropy_of_each_row(n, dtype):
    return _soft_cross_entropy(n, dtype, max_rows=n, reduction="none")


def soft_cross_entropy_in_groups(n, dtype):
    return _soft_cross_entropy(n, dtype, max_rows=n, workspace_bytes=1 << 12)


def soft_cross_entropy_of_each_row_in_groups(n, dtype):
    return _soft_cross_entropy(n, dtype, max_rows=n, workspace_bytes=1 << 12, reduction="none")


def word_patch_alignment(n, dtype):
    features = leaf(3, n, 16, dtype=dtype), leaf(3, 20, 16, dtype=dtype)

    def call(*tensors):
        return ops.word_patch_alignment_loss(ops.word_patch_alignment(*tensors[:4]), tensors[4])

    return call, (*features, masks(3, n), masks(3, 20), masks(3))


def matmul(n, dtype):
    return ops.matmul, (leaf(n, 16, dtype=dtype), leaf(16, 9, dtype=dtype), leaf(9, dtype=dtype))


def ema(n, dtype):
    single = {"dtype": torch.float32}
    tensors = floats(n, 3, **single), floats(n, 3, dtype=dtype), floats(n, 3, dtype=dtype)

    def call(average, source, copy, decay):
        return ops.ema([average], [source], decay, [copy], check_finite=True)

    return call, (*tensors, scalar(gradient=False))


def adamw_ema(n, dtype):
    single = {"dtype": torch.float32}
    tensors = [floats(n, 3, **single) for _ in range(5)]
    copies = [floats(n, 3, dtype=dtype) for _ in range(2)]

    def call(*tensors):
        nonfinite = ops.last_exceeding([tensors[1]])
        lists = [[t] for t in tensors]
        return ops.adamw_ema(*lists, step=3, lr=1e-3, decay=0.99, nonfinite=nonfinite)

    return call, (*tensors, *copies)


CALLS = {
    function.__name__: function
    for function in (
        contrastive,
        sigmoid,
        sigmoid_with_numbers,
        momentum,
        momentum_with_numbers,
        cross_attention,
        packed_attention,
        attention_without_bounds,
        soft_cross_entropy,
        soft_cross_entropy_of_some_rows,
        soft_cross_entropy_of_each_row,
        soft_cross_entropy_in_groups,
        soft_cross_entropy_of_each_row_in_groups,
        word_patch_alignment,
        matmul,
        ema,
        adamw_ema,
    )
}
