"""A run small enough for tests: a CLIP of a few thousand weights on a few random pairs."""

import json
from types import SimpleNamespace

import torch

from fastvlp.data.openmoji.loader import OpenMojiLoader
from fastvlp.models import clip
from fastvlp.train import parallel, run
from fastvlp.train.config import TrainClip
from fastvlp.train.tasks.base import Task
from fastvlp.train.tasks.clip import ClipTask

MODEL = clip.ClipConfig(8, 8, 4, 8, 2, 2, 8, 2, 2, context_length=6, vocab_size=32)
# Four steps an epoch, so that some checkpoints lie at the end of one and some within.
PAIRS = 32


class Pairs:
    """In place of the OpenMoji set: random images, and captions that are numbers."""

    def load(self, split):
        g = torch.Generator().manual_seed(len(split))
        images = torch.randint(0, 256, (PAIRS, 3, 8, 8), generator=g, dtype=torch.uint8)
        return images, [str(i) for i in range(PAIRS)]

    def samples(self, split):
        for i in range(PAIRS):
            about = {"base": str(i // 4), "drawing": str(i)}
            yield SimpleNamespace(members={"json": json.dumps(about).encode()})


class Numbers:
    """A tokenizer of captions that are numbers."""

    def __call__(self, captions):
        ids = [[1, 2 + int(c) % 7, 9 + int(c) // 7, 31, 0, 0] for c in captions]
        return torch.tensor(ids, dtype=torch.int64).view(-1, 6)

    def save(self, path):
        path.write_text("{}")


class NoisyTask(ClipTask):
    """Takes random numbers from torch's generator at each step, as dropout does."""

    noise = 0.1

    def losses(self, model, batch):
        batch.images = batch.images + self.noise * torch.randn_like(batch.images)
        return super().losses(model, batch)


def settings(folder, **changes):
    values = {
        "folder": folder, "model": "tiny", "steps": 8, "batch_size": 8, "warmup": 2, "lr": 1e-2,
        "save_every": 2, "log_every": 1, "progress": False, "precision": "float32",
        "device": "cpu", "ema": 0.9,
    }  # fmt: skip
    return TrainClip(**{**values, **changes})


def build(config, ranks, kind=NoisyTask, dtype=torch.float32):
    """The task and the loader of a run."""
    torch.manual_seed(config.seed)
    rows = config.batch_size // ranks.world_size
    place = {"rank": ranks.rank, "world_size": ranks.world_size}
    tokenizer = Numbers()
    loader = OpenMojiLoader(
        Pairs(), "train", rows, tokenizer, training=True, seed=config.seed, **place
    )
    held_out = {"held_out": OpenMojiLoader(Pairs(), "a", rows, tokenizer, training=False, **place)}
    task = kind(
        clip.Clip(MODEL).to(dtype), tokenizer, ranks, held_out=held_out,
        chunk_size=config.chunk_size,
        groups={str(i): [str(4 * i), str(4 * i + 1)] for i in range(10)},
    )  # fmt: skip
    return task, loader


def train(folder, kind=NoisyTask, dtype=torch.float32, **changes):
    """Runs, or resumes, in this process or on the ranks it is one of; returns scores and task."""
    config = settings(folder, **changes)
    with parallel.ranks("cpu") as ranks:
        task, loader = build(config, ranks, kind, dtype)
        return run.fit(config, task, loader, ranks), task


class PlainTask(ClipTask):
    """Without noise: what ranks and chunks must agree on."""


def weights(folder):
    """Of the saved model."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


class Regression(Task):
    """A mean over rows, of which plain accumulation is exact."""

    def __init__(self, chunk_size=None):
        torch.manual_seed(0)
        self.model, self.chunk_size = torch.nn.Linear(3, 1).double(), chunk_size

    def losses(self, model, batch):
        error, rows = model(batch).squeeze(1), max(len(batch), 1)
        return {"loss": error.square().sum() / rows, "size": error.abs().sum() / rows}

    def split(self, batch, rows, least=1):
        parts = [*batch.split(rows), *[batch[:0]] * least][: max(least, -(-len(batch) // rows))]
        return [(part, len(part) / max(len(batch), 1)) for part in parts]
