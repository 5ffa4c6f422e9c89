"""open_clip's own training script on our shards, with our loss in place of its own."""

import io
import json
from functools import partial

import numpy as np
import pytest

import fastvlp.losses
from fastvlp.data.shards.write import Sample, write_shard

SHARDS, PER_SHARD, BATCH = 2, 16, 8


def samples(shard):
    from PIL import Image

    rng = np.random.default_rng(shard)
    for i in range(PER_SHARD):
        png = io.BytesIO()
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(png, "png")
        text = f"image {i} of shard {shard}"
        yield Sample(f"{shard}{i:03d}", {"png": png.getvalue(), "txt": text.encode()})


@pytest.fixture(scope="module")
def script():
    """Imported before a test notes the levels of all loggers, which the script changes."""
    import open_clip_train.main

    return open_clip_train.main


def curve(folder, module, script, monkeypatch):
    """Runs the script for two epochs; the loss of each of its steps."""
    import open_clip_train.data

    losses = []

    def create_loss(args):
        loss = module.ClipLoss(rank=args.rank, world_size=args.world_size)
        loss.register_forward_hook(
            lambda _, inputs, out: losses.append(out["contrastive_loss"].item())
        )
        return loss

    monkeypatch.setattr(script, "create_loss", create_loss)
    # It shuffles samples by the time of day.
    monkeypatch.setattr(open_clip_train.data, "_SAMPLE_SHUFFLE_SIZE", 1)
    monkeypatch.setattr(open_clip_train.data, "_SAMPLE_SHUFFLE_INITIAL", 1)
    # It knows no end mark of a shard, which webdataset 1.0 puts after the files.
    files_of = partial(open_clip_train.data.tar_file_expander, eof_value=None)
    monkeypatch.setattr(open_clip_train.data, "tar_file_expander", files_of)
    script.main([
        "--train-data", str(folder / f"shard-{{0..{SHARDS - 1}}}.tar"),
        "--train-num-samples", str(SHARDS * PER_SHARD), "--dataset-type", "webdataset",
        "--model", "tiny-test", "--epochs", "2", "--batch-size", str(BATCH), "--workers", "0",
        "--precision", "fp32", "--device", "cpu", "--warmup", "2", "--lr", "1e-3", "--seed", "3",
        "--logs", str(folder / "logs"), "--name", module.__name__, "--save-frequency", "0",
    ])  # fmt: skip
    return losses


def test_the_script_has_the_same_curve_with_our_loss(tmp_path, script, monkeypatch):
    import open_clip

    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1,
        },
    }  # fmt: skip
    (tmp_path / "tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    for shard in range(SHARDS):
        write_shard(tmp_path / f"shard-{shard}.tar", samples(shard))
    theirs, ours = (
        curve(tmp_path, module, script, monkeypatch) for module in (open_clip.loss, fastvlp.losses)
    )
    assert len(theirs) == 2 * SHARDS * PER_SHARD // BATCH
    assert theirs[-1] != theirs[0]
    assert ours == pytest.approx(theirs, abs=1e-3)
