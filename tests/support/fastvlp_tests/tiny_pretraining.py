"""Runs of ViLT and ALBEF small enough for tests, on the random pairs of `tiny_run`."""

import torch

from fastvlp.data.openmoji.loader import OpenMojiLoader
from fastvlp.data.text import BertTokenizer
from fastvlp.data.text.masked import MaskingTokenizer
from fastvlp.models import albef
from fastvlp.models.vilt import ViltConfig
from fastvlp.train import parallel, run
from fastvlp.train.config import TrainAlbef, TrainVilt
from fastvlp.train.tasks.albef import AlbefTask
from fastvlp.train.tasks.vilt import PretrainingVilt, ViltTask
from fastvlp_tests.tiny_run import Pairs

DIGITS = [str(i) for i in range(10)]
TOKENIZER = BertTokenizer(
    ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *DIGITS, *(f"##{i}" for i in DIGITS)],
    context_length=6,
)
VILT = ViltConfig(8, 4, 16, 1, 2, TOKENIZER.vocab_size, 6, dropout=0.1)
ALBEF = albef.AlbefConfig(
    8, 4, 16, 1, 2, 16, 2, 1, 1, TOKENIZER.vocab_size, 6, 8, queue_size=20, queue_ids=True
)


def settings(folder, system, **changes):
    values = {
        "folder": folder, "steps": 8, "batch_size": 8, "warmup": 2, "lr": 1e-3, "save_every": 2,
        "log_every": 1, "progress": False, "precision": "float32", "device": "cpu",
        "mask_rate": 0.5,
    }  # fmt: skip
    return {"vilt": TrainVilt, "albef": TrainAlbef}[system](**{**values, **changes})


def build(config, ranks):
    """The task and the loader of a run."""
    torch.manual_seed(config.seed)
    place = {"rank": ranks.rank, "world_size": ranks.world_size}
    rows = config.batch_size // ranks.world_size
    masking = MaskingTokenizer(TOKENIZER, rate=config.mask_rate)
    loader = OpenMojiLoader(
        Pairs(), "train", rows, masking, training=True, seed=config.seed, **place
    )
    held_out = {
        "held_out": OpenMojiLoader(Pairs(), "a", rows, TOKENIZER.padded, training=False, **place)
    }
    options = {
        "held_out": held_out, "chunk_size": config.chunk_size, "reference": config.reference
    }  # fmt: skip
    if isinstance(config, TrainVilt):
        return ViltTask(PretrainingVilt(VILT), TOKENIZER, ranks, **options), loader
    model = albef.Albef(ALBEF)
    return AlbefTask(model, TOKENIZER, ranks, alpha_steps=5, candidates=4, **options), loader


def fit(folder, system, **changes):
    """Runs, or resumes; returns scores and task."""
    config = settings(folder, system, **changes)
    with parallel.ranks("cpu") as ranks:
        task, loader = build(config, ranks)
        return run.fit(config, task, loader, ranks), task


def train(folder):
    """An ALBEF run: momentum encoder, queue, dropout, masking and sampled negatives all have to
    come back."""
    return fit(folder, "albef")
