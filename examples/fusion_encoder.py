"""Image-text matching by a fusion encoder of your own, as in BLIP, trained on a CPU in seconds.

Images show two coloured squares; captions name the left colour and the right one. A head on the
[CLS] token tells an image's own caption from two hard negatives: one that names a colour which is
not there, and one with the two colours swapped, for which the model must look where each one is.

What fastvlp brings: captions are packed, so that no padding is computed, and `FusionLayer` projects
the keys and values of an image once for its three captions.
"""

import time

import torch
import torch.nn.functional as F
from torch import nn

from fastvlp.nn import FusionLayer
from fastvlp.ops.packing import PairLayout, TextLayout

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}
TEMPLATES = ("{} {}", "left {} right {}", "a {} square on the left and a {} one on the right")
WORDS = ["[CLS]", *COLOURS, *"a and left on one right square the".split()]
KINDS = ("own caption", "wrong colour", "swapped colours")
WIDTH, LAYERS, STEPS, BATCH, RATE = 64, 2, 150, 64, 2e-3


def draw(left, right):
    """An image [3, 32, 32] of two squares, with noise."""
    image = torch.zeros(3, 32, 32)
    for column, colour in ((2, left), (18, right)):
        image[:, 10:22, column : column + 12] = torch.tensor(COLOURS[colour])[:, None, None]
    return image + 0.1 * torch.randn_like(image)


def caption(left, right, template):
    words = template.format(left, right).split()
    return torch.tensor([WORDS.index(word) for word in ["[CLS]", *words]])


def batch(size):
    """Images [size, 3, 32, 32] and captions of ids: all images' own ones, then each negative."""
    images, captions = [], [[] for _ in KINDS]
    for number in range(size):
        left, right, other, _ = (list(COLOURS)[i] for i in torch.randperm(len(COLOURS)).tolist())
        wrong = (other, right) if torch.rand(()) < 0.5 else (left, other)
        template = TEMPLATES[number % len(TEMPLATES)]
        images.append(draw(left, right))
        for kind, colours in zip(captions, ((left, right), wrong, (right, left)), strict=True):
            kind.append(caption(*colours, template))
    return torch.stack(images), sum(captions, [])


class Matcher(nn.Module):
    """Patches and words are embedded; layers of self-attention and cross-attention fuse them."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, kernel_size=8, stride=8)
        self.places = nn.Parameter(torch.randn(16, WIDTH))
        self.words, self.positions = nn.Embedding(len(WORDS), WIDTH), nn.Embedding(16, WIDTH)
        self.image_norm, self.text_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(
            FusionLayer(WIDTH, heads=4, dropout=0, attention_dropout=0) for _ in range(LAYERS)
        )
        # BERT's initialisation is for widths of 768: at this one attention would stay uniform.
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, images, captions, text_index, image_index):
        """Logits [pairs, 2] of the pairs captions[text_index[p]], images[image_index[p]]."""
        patches = self.patches(images).flatten(2).mT + self.places
        lengths = [len(ids) for ids in captions]
        positions = torch.cat([torch.arange(length) for length in lengths])
        packed = self.text_norm(self.words(torch.cat(captions)) + self.positions(positions))
        texts = TextLayout.from_lengths(lengths, max(lengths))
        pairs = PairLayout.make(texts, text_index, image_index, len(images))
        x, keys = pairs.expand(packed), self.image_norm(patches)
        for layer in self.layers:
            x = layer(
                x,
                pairs.cu_seqlens_pairs,
                keys,
                pairs.cu_seqlens_images,
                max_seqlen_pairs=pairs.max_seqlen_pairs,
                max_seqlen_images=pairs.max_seqlen_images,
            )
        return self.head(pairs.first(x))


def match(model, images, captions):
    """Logits [captions, 2] and labels: of each image its own caption matches, no other."""
    texts = torch.arange(len(captions))
    labels = (texts < len(images)).long()
    return model(images, captions, texts, texts % len(images)), labels


def train(model):
    adam = torch.optim.AdamW(model.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, STEPS, cycle_momentum=False)
    for step in range(1, STEPS + 1):
        loss = F.cross_entropy(*match(model, *batch(BATCH)))
        loss.backward()
        adam.step()
        rate.step()
        adam.zero_grad()
        if step % 25 == 0:
            print(f"step {step:3} of {STEPS}  loss {loss.item():.3f}", flush=True)


def main():
    start = time.perf_counter()
    torch.manual_seed(0)
    model = Matcher()
    train(model)
    with torch.inference_mode():
        logits, labels = match(model.eval(), *batch(300))
    right = (logits.argmax(1) == labels).view(len(KINDS), -1).float().mean(1).tolist()
    scores = dict(zip(KINDS, right, strict=True))
    print("accuracy on new images:", ", ".join(f"{k} {a:.3f}" for k, a in scores.items()))
    print(f"{time.perf_counter() - start:.0f} s in all")
    return scores


if __name__ == "__main__":
    main()
