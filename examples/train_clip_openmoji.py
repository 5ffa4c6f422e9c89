"""Train a tiny CLIP from scratch on OpenMoji drawings and their names, on a CPU, in minutes.

Prints retrieval on images that training never saw: *composition* (new combinations of known
words, such as "woman astronaut: dark skin tone") and *concept* (things never seen). Keeps the model
in the cache folder: openmoji_clip/tiny_clip{.safetensors,.json,_tokenizer.json}.
"""

import time

import torch
import torch.nn.functional as F
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from fastvlp.data import openmoji
from fastvlp.data.cache import cache_root
from fastvlp.data.text import train_tokenizer
from fastvlp.evaluate.retrieval import retrieval
from fastvlp.losses import ClipLoss
from fastvlp.models import clip

STEPS, BATCH, RATE = 600, 128, 1e-3


def jitter(images):
    """Shift by up to a tenth and scale by up to 15 %, but never flip: arrows have a side."""
    move = torch.zeros(len(images), 2, 3)
    move[:, 0, 0] = move[:, 1, 1] = torch.empty(len(images)).uniform_(0.85, 1.15)
    move[:, :, 2].uniform_(-0.2, 0.2)  # unit: half a width
    grid = F.affine_grid(move, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train(model, images, tokens):
    loss_of = ClipLoss()
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.2, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        adam, RATE, STEPS, pct_start=0.1, cycle_momentum=False
    )
    epochs = [torch.randperm(len(images)) for _ in range(STEPS * BATCH // len(images) + 1)]
    with Progress(
        *Progress.get_default_columns(),
        TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]:.2f}"),
    ) as progress:
        task = progress.add_task("training", total=STEPS, loss=float("nan"))
        for rows in torch.cat(epochs).split(BATCH)[:STEPS]:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(*model(jitter(images[rows]), tokens[rows]))
            loss.backward()
            adam.step()
            rate.step()
            adam.zero_grad()
            model.clamp_logit_scale_()
            progress.update(task, advance=1, loss=loss.item())


def main():
    start, folder = time.perf_counter(), cache_root() / "openmoji_clip"
    torch.manual_seed(0)
    pairs = {split: openmoji.build(size=64).load(split) for split in openmoji.SPLITS}
    tokenizer = train_tokenizer(pairs["train"][1], model="word")
    inputs = {s: (images / 127.5 - 1, tokenizer(names)) for s, (images, names) in pairs.items()}
    model = clip.create(
        "tiny", vocab_size=tokenizer.vocab_size, context_length=tokenizer.context_length
    )
    train(model, *inputs["train"])
    clip.save(model, folder / "tiny_clip")
    tokenizer.save(folder / "tiny_clip_tokenizer.json")
    for split in ("composition", "concept"):
        with torch.inference_mode():
            images, texts, _ = model.eval()(*inputs[split])
        for way, result in retrieval(images, texts).items():
            scores = [
                f"R@{k} {result[f'R@{k}']:.3f} (chance {result[f'chance_R@{k}']:.3f})"
                for k in (1, 5, 10)
            ]
            print(f"{split:11} {len(texts)} pairs  {way:13}  {'  '.join(scores)}")
    print(f"{time.perf_counter() - start:.0f} s in all. The model is in {folder}")


if __name__ == "__main__":
    main()
