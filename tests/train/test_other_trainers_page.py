"""The page on other trainers: each of its blocks runs as it stands, with the real library."""

import math
import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "other_trainers.md"
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def blocks():
    parts = SECTION.split(PAGE.read_text())[1:]
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        for number, block in enumerate(BLOCK.findall(text)):
            yield pytest.param(block, id=f"{title} {number}")


def test_the_page_has_every_trainer():
    ids = " ".join(block.id for block in blocks())
    for name in ("open_clip", "Hugging Face", "Lightning", "momentum", "Cross-attention"):
        assert name in ids


@pytest.mark.parametrize("block", list(blocks()))
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "page"}
    if "open_clip_train" in block:
        import open_clip.factory
        import open_clip_train.main
        import open_clip_train.params

        import fastvlp.losses

        for module in (open_clip, open_clip.factory, open_clip_train.main):
            monkeypatch.setattr(module, "create_loss", module.create_loss)
        exec(block, namespace)
        args = open_clip_train.params.parse_args([])
        args.rank, args.world_size, args.distill = 0, 1, False
        loss = open_clip_train.main.create_loss(args)
        assert isinstance(loss, fastvlp.losses.ClipLoss)
        return
    exec(block, namespace)
    assert namespace["losses"] and all(map(math.isfinite, namespace["losses"]))
