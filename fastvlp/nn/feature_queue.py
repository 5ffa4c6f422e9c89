"""The queue of momentum features that ALBEF and MoCo contrast a batch against."""

from numbers import Integral

import torch
import torch.distributed as dist

from ..distributed import Gather, Shards, reporting, spans_ranks, validate_across_ranks

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_ID = -100  # of rows that no pair was written to, as in ALBEF's retrieval fine-tuning


class FeatureQueue(torch.nn.Module):
    """Ring buffers of the last `size` pairs of features, on the module's device.

    Source: He et al., MoCo, arXiv 1911.05722, section 3.2; Li et al., ALBEF, arXiv 2107.07651.
    Batches of any size wrap around the end; without a group nothing waits for a GPU. Everything is
    a buffer: state_dict resumes exactly, addresses never change, and `.to(device)` moves it.

        result = momentum_contrastive(image, text, image_m, text_m, **queue.keys(), ...)
        queue.enqueue(image_m, text_m)

    Args:
        size: rows kept, Q.
        dim: width of the features, D.
        dtype: of the buffers; features are cast to it when they enter.
        fill: "empty": rows count as keys only once they were written. "random": the queue starts
            full of random unit vectors, negatives like any other, as in ALBEF.
        with_ids: also keep an int64 id for each row, -100 until written.
        check_finite: refuse a batch that holds NaN or infinity. It waits for the device.
        group: gather the batch over this process group before it enters. Every rank calls with
            its own part, of any size (no rows included), and all queues stay equal. The ranks
            agree on their sizes, options and the queue's position first, which waits for the
            device once.

    Examples:
        >>> import torch
        >>> from fastvlp import FeatureQueue
        >>> queue = FeatureQueue(size=64, dim=16)
        >>> queue.enqueue(torch.randn(4, 16), torch.randn(4, 16))
        >>> queue.keys()["queue_length"]
        tensor(4)
    """

    image_queue: torch.Tensor
    text_queue: torch.Tensor
    queue_ids: torch.Tensor | None
    queue_length: torch.Tensor
    position: torch.Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        fill: str = "empty",
        with_ids: bool = False,
        check_finite: bool = False,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name}: expected a whole number above 0, got {value!r}")
        if dtype not in _DTYPES:
            raise TypeError(f"dtype: expected one of {_DTYPES}, got {dtype}")
        if fill not in ("empty", "random"):
            raise ValueError(f"fill: expected 'empty' or 'random', got {fill!r}")
        spans_ranks(group)  # refuses what is no group
        self.check_finite, self.group = check_finite, group
        for name in ("image_queue", "text_queue"):
            rows = torch.zeros(size, dim, dtype=dtype, device=device)
            if fill == "random":
                random = torch.randn(size, dim, device=device)
                rows.copy_(torch.nn.functional.normalize(random, dim=1))
            self.register_buffer(name, rows)
        ids = torch.full((size,), NO_ID, dtype=torch.int64, device=device) if with_ids else None
        self.register_buffer("queue_ids", ids)
        length = size if fill == "random" else 0
        for name, value in (("queue_length", length), ("position", 0)):
            self.register_buffer(name, torch.full((), value, dtype=torch.int64, device=device))

    @property
    def size(self) -> int:
        return self.image_queue.shape[0]

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.image_queue.shape[1]}, dtype={self.image_queue.dtype}"

    def keys(self) -> dict[str, torch.Tensor | None]:
        """The keyword arguments of `momentum_contrastive` that the queue provides.

        The buffers themselves, not copies: use them before the next enqueue.
        """
        return {
            "image_queue": self.image_queue,
            "text_queue": self.text_queue,
            "queue_ids": self.queue_ids,
            "queue_length": self.queue_length,
        }

    @torch.no_grad()
    def enqueue(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        ids: torch.Tensor | None = None,
    ) -> None:
        """Writes the batch over the oldest rows; of more than `size` pairs the last ones stay.

        With a group, the parts enter in rank order.

        Raises TypeError or ValueError, with a group RuntimeError on every rank, when an argument
        is not as described; the queue is then as it was, on every rank.
        """
        if not spans_ranks(self.group):
            self._check(image_features, text_features, ids)
        else:
            shards = self._agree(self.group, image_features, text_features, ids)
            parts = (image_features, text_features, *(() if ids is None else (ids,)))
            # All in flight together, in the queue's dtype.
            flying = [Gather(part, shards) for part in self._cast(*parts)]
            image_features, text_features, *rest = [each.rows(slice(None)) for each in flying]
            ids = rest[0] if rest else None
        rows = min(image_features.shape[0], self.size)
        if rows == 0:
            return
        skipped = image_features.shape[0] - rows
        offset = torch.arange(skipped, skipped + rows, device=self.position.device)
        at = (self.position + offset) % self.size
        parts = self._cast(image_features, text_features, *(() if ids is None else (ids,)))
        buffers = [self.image_queue, self.text_queue]
        if self.queue_ids is not None:
            buffers.append(self.queue_ids)
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.index_copy_(0, at, part[skipped:])
        self.position.add_(skipped + rows).remainder_(self.size)
        self.queue_length.add_(rows).clamp_(max=self.size)

    def _cast(self, image, text, *ids):
        return [image.to(self.image_queue.dtype), text.to(self.text_queue.dtype), *ids]

    def _check(self, image, text, ids) -> None:
        dim, device = self.image_queue.shape[1], self.image_queue.device
        for name, t in (("image_features", image), ("text_features", text)):
            if not isinstance(t, torch.Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
            if t.dim() != 2 or t.shape[1] != dim or t.shape[0] != image.shape[0]:
                raise ValueError(
                    f"{name}: expected shape [B, {dim}], the same B for images and texts, got "
                    f"{tuple(t.shape)}"
                )
            if not t.is_floating_point():
                raise TypeError(f"{name}: expected a floating-point dtype, got {t.dtype}")
            _same_device(name, t, device)
            if self.check_finite and not t.isfinite().all():
                raise ValueError(f"{name}: expected finite features, got NaN or infinity")
        self._check_ids(ids, image.shape[0])

    def _check_ids(self, ids, rows: int) -> None:
        if (ids is None) != (self.queue_ids is None):
            raise ValueError(
                "ids: expected one per pair, because the queue was made with_ids=True; got None"
                if ids is None
                else "ids: expected None, because the queue keeps none; make it with_ids=True"
            )
        if ids is None:
            return
        if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64:
            raise TypeError(
                f"ids: expected an int64 tensor, got {getattr(ids, 'dtype', type(ids))}"
            )
        if ids.shape != (rows,):
            raise ValueError(f"ids: expected shape [{rows}], got {tuple(ids.shape)}")
        _same_device("ids", ids, self.image_queue.device)

    def _agree(self, group: dist.ProcessGroup, image, text, ids) -> Shards:
        with reporting(group, "FeatureQueue.enqueue"):
            self._check(image, text, ids)
        facts = {
            "size": self.size,
            "dim": self.image_queue.shape[1],
            "dtype": _DTYPES.index(self.image_queue.dtype),
            "with_ids": self.queue_ids is not None,
        }
        values = {"position": self.position, "queue_length": self.queue_length}
        return validate_across_ranks(
            group, "FeatureQueue.enqueue", rows=len(image), facts=facts, values=values
        )


def _same_device(name: str, t: torch.Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{name}: expected the queue's device, {device}, got {t.device}; move it")
