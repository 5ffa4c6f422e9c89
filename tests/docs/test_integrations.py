"""The page on other trainers: each of its blocks runs as it stands, with the real library."""

import math

import pytest
import torch
from fastvlp_tests.pages import INTEGRATIONS, sections

BLOCKS = [
    pytest.param(block, id=f"{title} {number}")
    for number, (title, block) in enumerate(sections(INTEGRATIONS))
]


def test_the_page_has_every_trainer():
    titles = " ".join(title for title, _ in sections(INTEGRATIONS))
    for name in ("open_clip", "Hugging Face", "Lightning", "accelerate", "timm", "momentum"):
        assert name in titles


@pytest.mark.parametrize("block", BLOCKS)
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
