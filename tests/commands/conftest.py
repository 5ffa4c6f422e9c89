"""A small trained CLIP on disk, and photographs to search in."""

import pytest
import torch
from fastvlp_tests import photo_shards

from fastvlp.data.text import train_tokenizer
from fastvlp.models import base, clip


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """What a run of CLIP leaves: random weights, a vocabulary, settings."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer([f"caption {i}" for i in range(9)], context_length=8)
    torch.manual_seed(0)
    model = clip.create(
        "tiny", vocab_size=tokenizer.vocab_size, context_length=8, vision_width=24,
        vision_layers=1, vision_heads=1, text_width=16, text_layers=1, text_heads=1, embed_dim=16,
    )  # fmt: skip
    base.save(model, folder / "model")
    tokenizer.save(folder / "tokenizer.json")
    (folder / "config.yaml").write_text("data: mine\neval_data: null\n")
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Seven photographs, one in a folder of its own, and two files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for number in range(7):
        name = f"more/{number}.jpg" if number == 6 else f"{number}.jpg"
        (folder / name).write_bytes(photo_shards.jpeg(number))
    (folder / "cut.jpg").write_bytes(photo_shards.jpeg(1)[:200])
    (folder / "notes.png").write_text("no image")
    return folder
