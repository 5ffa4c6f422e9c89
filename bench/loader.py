"""Images a second, and CPU time for each image, from shards or files to batches.

    python bench/loader.py --threads 2

Photographs of about 500 x 375 pixels cut from scikit-image's, as JPEGs of quality 90 in WebDataset
shards. Every implementation makes one epoch of batches by one recipe with as many threads or worker
processes. `ms` is wall time for each epoch; `cpu_ms` is CPU time for each image, workers included,
which says more where the machine is shared. torchvision's files are in memory. The floor is DALI's
decoding alone. Errors are against torchvision on Pillow images, where a recipe is not random.
"""

from __future__ import annotations

import argparse
import functools
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import measure, report, timing
from _harness.measure import BOUND, OURS, Missing
from _harness.run import Run
from PIL import Image

from fastvlp.data import Loader, RgbConversion
from fastvlp.data.images.recipes import RECIPES, CentreCrop, RandomCrop, Recipe, SquareResize
from fastvlp.data.images.transforms import transformed
from fastvlp.data.shards.write import Sample, write_shard

OP, PHASE = "loader", "epoch"
PACKAGES = ("torchvision", "pillow", "nvidia-dali-cuda130", "webdataset", "scikit-image")
QUICK = ("clip_train", "albef_pretrain", "vilt_finetune")
PER_SHARD = 64
LEGEND = "cpu_ms: CPU time for an image, workers included."
DECODING = f"{BOUND} (decoding)"
NOTES = {DECODING: "DALI's decoder alone, without resizing, normalising or batches"}
Batches = Callable[[], Iterable[torch.Tensor]]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    rate = ("images/s", "images")
    with (
        Run(args, PACKAGES, rate=rate, columns=("cpu_ms",), legend=LEGEND, summary=summary) as run,
        tempfile.TemporaryDirectory() as folder,
    ):
        data = Data(photographs(args.images), Path(folder), args.batch)
        for name in args.recipe:
            run.add(*measured(name, data, run.settings))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = measure.parser(__doc__.split("\n")[0])
    flags.add_argument("--images", type=int, default=0, help="in an epoch; 0: 512, or 128 if quick")
    flags.add_argument("--batch", type=int, default=64)
    flags.add_argument("--recipe", nargs="+", choices=list(RECIPES), default=None)
    args = flags.parse_args(argv)
    if args.images < 0 or args.batch < 1:
        flags.error("--images and --batch must be positive")
    if args.device != "cpu":
        flags.error("--device: only the CPU's loaders are compared here")
    args.images = args.images or (128 if args.quick else 512)
    args.recipe = args.recipe or (QUICK if args.quick else list(RECIPES))
    return args


@dataclass
class Data:
    """The same images as shards and in memory."""

    images: list[bytes]
    folder: Path
    batch: int

    def __post_init__(self) -> None:
        for first in range(0, len(self.images), PER_SHARD):
            numbered = enumerate(self.images[first : first + PER_SHARD], first)
            samples = [Sample(f"{i:06d}", {"jpg": image, "txt": b"a"}) for i, image in numbered]
            write_shard(self.folder / f"{first // PER_SHARD:05d}.tar", samples)

    @property
    def shards(self) -> list[str]:
        return sorted(str(path) for path in self.folder.glob("*.tar"))


def photographs(count: int) -> list[bytes]:
    """Parts of scikit-image's photographs, enlarged where one is too small, as JPEGs."""
    from skimage import data

    sources = [
        Image.fromarray(getattr(data, name)()).convert("RGB")
        for name in ("astronaut", "chelsea", "coffee", "rocket", "retina")
    ]
    generator = np.random.default_rng(0)
    found = []
    for number in range(count):
        source = sources[number % len(sources)]
        width, height = (int(side * generator.uniform(0.9, 1.1)) for side in (500, 375))
        if number % 3 == 2:
            width, height = height, width
        scale = max(1.0, width / source.width, height / source.height)
        size = round(source.width * scale + 1), round(source.height * scale + 1)
        whole = source if scale == 1.0 else source.resize(size, Image.Resampling.BICUBIC)
        left = int(generator.integers(0, whole.width - width + 1))
        top = int(generator.integers(0, whole.height - height + 1))
        content = io.BytesIO()
        whole.crop((left, top, left + width, top + height)).save(content, "JPEG", quality=90)
        found.append(content.getvalue())
    return found


def ours(name: str, data: Data, threads: int, backend: str) -> Batches:
    loader = Loader(
        data.shards,
        name,
        data.batch,
        threads=threads,
        backend=backend,
        device="cpu",
        last_batch="partial",
        cache_dir=data.folder,
    )

    def epoch() -> Iterable[torch.Tensor]:
        loader.set_epoch(0)
        return (batch.images for batch in loader)

    return epoch


class Files(torch.utils.data.Dataset):
    """JPEGs in memory, each through a transform of its bytes."""

    def __init__(self, images: Sequence[bytes], transform: Callable[[bytes], torch.Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.images[index])


def padded(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """One batch, images in its upper left corners."""
    height, width = (max(image.shape[d] for image in images) for d in (1, 2))
    out = torch.zeros(len(images), 3, height, width)
    for place, image in zip(out, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return out


def torch_loader(data: Data, threads: int, transform: Callable[[bytes], torch.Tensor]) -> Batches:
    loader = torch.utils.data.DataLoader(
        Files(data.images, transform),
        data.batch,
        num_workers=threads,
        persistent_workers=True,
        collate_fn=padded,
    )
    return lambda: loader


def webdataset_loader(
    data: Data, threads: int, transform: Callable[[bytes], torch.Tensor]
) -> Batches:
    import webdataset

    dataset = webdataset.WebDataset(data.shards, shardshuffle=False, empty_check=False)
    dataset = dataset.to_tuple("jpg", "txt").map(lambda sample: transform(sample[0]))
    loader = torch.utils.data.DataLoader(
        dataset, data.batch, num_workers=threads, persistent_workers=True, collate_fn=padded
    )
    return lambda: loader


class PillowTransform:
    """A recipe in Pillow and torchvision, as the systems' own code has it."""

    def __init__(self, recipe: Recipe) -> None:
        import torchvision.transforms as tv

        self.recipe = recipe
        self.end = tv.Compose([tv.ToTensor(), tv.Normalize(recipe.mean, recipe.std)])

    def __call__(self, content: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        draws = torch.rand(self.recipe.uses).tolist()
        return self.end(transformed(image, self.recipe.plan(*image.size, draws)))


class TensorTransform:
    """A recipe without RandAugment in torchvision's functions of uint8 tensors."""

    def __init__(self, recipe: Recipe) -> None:
        from torchvision.transforms import InterpolationMode, v2

        self.recipe, cubic = recipe, {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
        if isinstance(recipe, RandomCrop):
            first = [v2.RandomResizedCrop(recipe.size, recipe.scale, recipe.ratio, **cubic)]
            first += [v2.RandomHorizontalFlip(recipe.flip)] if recipe.flip else []
        elif isinstance(recipe, CentreCrop):
            first = [v2.Resize(recipe.size, **cubic), v2.CenterCrop(recipe.size)]
        elif isinstance(recipe, SquareResize):
            first = [v2.Resize((recipe.size, recipe.size), **cubic)]
        else:
            first = [self._keep_aspect]
        self.cubic, self.resize = cubic, v2.functional.resize
        end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(recipe.mean, recipe.std)]
        self.transform = v2.Compose([*first, *end])

    def _keep_aspect(self, image: torch.Tensor) -> torch.Tensor:
        width, height = self.recipe.plan(image.shape[2], image.shape[1], []).size
        return self.resize(image, [height, width], **self.cubic)

    def __call__(self, content: bytes) -> torch.Tensor:
        from torchvision.io import ImageReadMode, decode_jpeg

        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return self.transform(decode_jpeg(encoded, ImageReadMode.RGB))


def decoding(data: Data, threads: int) -> Batches:
    """DALI's decoder and nothing else; yields no batches."""
    from fastvlp.data.images.dali import DaliBackend

    backend = DaliBackend(
        RECIPES["clip_eval"], data.batch, threads, torch.device("cpu"), RgbConversion()
    )

    def epoch() -> Iterable[torch.Tensor]:
        for first in range(0, len(data.images), data.batch):
            backend.decode(data.images[first : first + data.batch])
        return ()

    return epoch


def implementations(name: str, data: Data, threads: int) -> dict[str, Callable[[], Batches]]:
    """What makes each implementation's epoch, by the implementation's name."""
    recipe = RECIPES[name]
    by_pillow = PillowTransform(recipe)
    # Those that fork first, before others have threads.
    found: dict[str, Callable[[], Batches]] = {
        "torchvision PIL": functools.partial(torch_loader, data, threads, by_pillow),
        "webdataset": functools.partial(webdataset_loader, data, threads, by_pillow),
    }
    if not getattr(recipe, "augment", None):
        by_tensor = TensorTransform(recipe)
        found["torchvision tensor"] = functools.partial(torch_loader, data, threads, by_tensor)
    found |= {
        OURS: functools.partial(ours, name, data, threads, "auto"),
        f"{OURS}, Pillow alone": functools.partial(ours, name, data, threads, "pil"),
        DECODING: functools.partial(decoding, data, threads),
    }
    return found


def cpu_seconds() -> float:
    """Of this process and of its living children."""
    own = os.times()
    total = own.user + own.system
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


class Neighbours(timing.Neighbours):
    """Workers are no neighbours."""

    @staticmethod
    def _read() -> tuple[float, float, float]:
        wall, _, busy = timing.Neighbours._read()
        return wall, cpu_seconds(), busy


class Clock:
    """Wall milliseconds of a call; keeps the CPU time of each by its name."""

    def __init__(self) -> None:
        self.cpu: dict[str, list[float]] = {}

    def __call__(self, call: Callable[[], Any]) -> float:
        began, spent = time.perf_counter(), cpu_seconds()
        call()
        elapsed = time.perf_counter() - began
        self.cpu.setdefault(call.implementation, []).append(cpu_seconds() - spent)
        return elapsed * 1e3


class Epoch:
    """One epoch of an implementation as a call."""

    def __init__(self, implementation: str, batches: Batches) -> None:
        self.implementation, self.batches = implementation, batches

    def __call__(self) -> None:
        for _ in self.batches():
            pass


def measured(
    name: str, data: Data, settings: measure.Settings
) -> tuple[list[dict[str, Any]], list[Missing]]:
    """Rows of one recipe, and which implementations failed and why."""
    calls, errors, missing = {}, {}, []
    reference = None if RECIPES[name].uses else first_batch(PillowTransform(RECIPES[name]), data)
    for implementation, make in implementations(name, data, settings.threads).items():
        with timing.status(f"{name}: warming up {implementation}"):
            try:
                batches = make()
                seen = [batch for batch in batches()]
            except Exception as error:
                if implementation == OURS:
                    raise
                missing.append(
                    Missing(implementation, f"{type(error).__name__}: {str(error)[:200]}")
                )
                continue
        if reference is not None and seen:
            errors[implementation] = measure.relative_error(seen[0], reference)
        calls[implementation] = Epoch(implementation, batches)
    clock = Clock()
    with Neighbours() as neighbours:
        times = timing.alternate(
            calls,
            min_rounds=settings.min_rounds,
            max_rounds=settings.max_rounds,
            budget_s=settings.budget_s,
            clock=clock,
            label=name,
        )
    count = len(data.images)
    rows = []
    for implementation in calls:
        row = measure.row(
            OP,
            measure.Implementation(
                implementation, make=lambda _: None, note=NOTES.get(implementation, "")
            ),
            "uint8",
            {"images": count, "batch": data.batch},
            f"{name} {PHASE}",
            times[implementation],
            None,
            {"images": errors[implementation]} if implementation in errors else None,
        )
        cpu = float(np.median(clock.cpu[implementation])) * 1e3 / count
        rows.append(row | {"cpu_ms": round(cpu, 3), "neighbours": neighbours.share})
    return rows, missing


def first_batch(transform: PillowTransform, data: Data) -> torch.Tensor:
    return padded([transform(image) for image in data.images[: data.batch]])


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each recipe: CPU time for an image against every baseline's."""
    lines = []
    for group in report.groups(rows):
        by_name = {row["impl"]: row["cpu_ms"] for row in group}
        mine = by_name.pop(OURS)
        # Of a very short run the system's clock may have seen nothing.
        seen = {name: cpu for name, cpu in by_name.items() if cpu}
        parts = [f"{mine / cpu:.0%} of {name}'s {cpu:.2f}" for name, cpu in seen.items()]
        lines.append(
            f"{group[0]['phase']}: {mine:.2f} ms of CPU time an image, {', '.join(parts)}."
        )
    return "\n".join(["", *lines])


if __name__ == "__main__":
    main()
