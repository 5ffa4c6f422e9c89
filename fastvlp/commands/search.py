"""``fastvlp search``: the images of a folder that are nearest to a text or an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from fastvlp.commands.contact_sheet import Cell, contact_sheet, save_png
from fastvlp.commands.progress import progress
from fastvlp.data.image_folder import encode_images, find_images
from fastvlp.data.images.conversion import RgbConversion
from fastvlp.data.images.integrity import ImageFault, open_rgb
from fastvlp.data.optional import require
from fastvlp.data.shards.pairs import IMAGE_SUFFIXES
from fastvlp.data.shards.sources import read_pairs
from fastvlp.factory import Created, create
from fastvlp.train import parallel, ranges
from fastvlp.train.config import Device

if TYPE_CHECKING:
    from PIL.Image import Image

# Unreadable images that are named.
_NAMED = 5


@dataclass(frozen=True)
class Hit:
    """An image that was found, and the cosine of its features and the query's."""

    path: Path
    score: float


@dataclass
class Search:
    """Find the images of a folder that are nearest to a text, or to an image, by a CLIP.

    Prints the scores, cosine similarities from -1 to 1, and writes the images found as one PNG.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of a run of `fastvlp train clip`, or a published checkpoint of CLIP, file or
    folder."""

    query: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="QUERY")]
    """A text, or the file of an image."""

    images: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder of the images, at any depth."""

    top: int = 12
    """Images to show."""

    captions: Path | None = None
    """File of captions to print with the images, such as the CSV that shards were made of."""

    output: Path = Path("search.png")
    """PNG file for the images found."""

    tokenizer: Path | None = None
    """Vocabulary of the captions. By default that of the run, beside the model, or CLIP's own."""

    activation: str | None = None
    """Of weights from open_clip, which do not tell it: gelu or quick_gelu."""

    batch_size: int = 64
    """Images that are encoded at a time."""

    device: Device = "auto"
    """Where to compute."""

    progress: bool = True
    """Show how far it is."""

    def __post_init__(self) -> None:
        ranges.check(self)

    def run(self) -> list[Hit]:
        """Search, print and write the sheet; the images found, the nearest first."""
        example = self._example()
        paths = find_images(self.images)
        captions = _captions(self.captions)
        with parallel.ranks(self.device) as ranks:
            made = clip_of(self.model, ranks.device, self.tokenizer, self.activation)
            query = self._query(made, ranks.device)
            features, kept, faults = self._encode(paths, made, ranks.device)
        hits = nearest(query, features, kept, self.top, without=example)
        self._say(hits, len(kept), faults, captions)
        self._draw(hits, captions, example)
        return hits

    def _example(self) -> Path | None:
        """The image that is searched by, if it is one."""
        path = Path(self.query)
        named = self.query.lower().endswith(IMAGE_SUFFIXES)
        if named and not path.is_file():
            raise FileNotFoundError(
                f"query: expected a text or the file of an image, there is no {path}"
            )
        return path if named else None

    def _query(self, made: Created, device: torch.device) -> Tensor:
        with torch.inference_mode():
            if (example := self._example()) is not None:
                try:
                    image = made.preprocess.read(example)
                except ImageFault as fault:
                    raise ValueError(f"query: {fault}") from fault
                found = made.model.encode_image(image[None].to(device))
            else:
                found = made.model.encode_text(made.tokenizer([self.query]).to(device))
        return F.normalize(found[0].float(), dim=-1).cpu()

    def _encode(self, paths: list[Path], made: Created, device: torch.device) -> Any:
        return encode_showing_progress(
            "encoding", paths, made, self.batch_size, device, show=self.progress
        )

    def _say(
        self, hits: list[Hit], searched: int, faults: list[ImageFault], captions: dict[str, str]
    ) -> None:
        print(f"{searched} images searched for {self.query!r}")
        if faults:
            count = "1 image" if len(faults) == 1 else f"{len(faults)} images"
            print(f"left out, because they cannot be read: {count}")
            for fault in faults[:_NAMED]:
                print(f"  {fault}")
            if len(faults) > _NAMED:
                print(f"  and {len(faults) - _NAMED} more")
        for place, hit in enumerate(hits, 1):
            line = f"{place:3}  {hit.score:6.3f}  {self._name(hit.path)}"
            caption = captions.get(self._name(hit.path))
            print(f"{line}  {caption}" if caption else line)

    def _draw(self, hits: list[Hit], captions: dict[str, str], example: Path | None) -> None:
        cells = []
        for place, hit in enumerate(hits, 1):
            lines = [self._name(hit.path)]
            lines += [captions[lines[0]]] if lines[0] in captions else []
            cells.append(Cell(_upright(hit.path), f"{place}   {hit.score:.3f}", lines))
        shown = None if example is None else _upright(example)
        save_png(contact_sheet(self.query, cells, shown), self.output)
        print(f"the images found are in {self.output}", flush=True)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.images).as_posix()


def encode_showing_progress(
    label: str,
    paths: list[Path],
    made: Created,
    batch_size: int,
    device: torch.device,
    *,
    show: bool,
) -> tuple[Tensor, list[Path], list[ImageFault]]:
    """`encode_images` by a model of `create`, with how far it is."""
    with progress(label, len(paths), "images", show) as done:
        return encode_images(
            paths,
            made.preprocess,
            made.model.encode_image,
            batch_size=batch_size,
            device=device,
            advance=lambda count, bad: done(count, f"{bad} unreadable" if bad else ""),
        )


def clip_of(
    model: str, device: torch.device, tokenizer: Path | None, activation: str | None
) -> Created:
    """A trained CLIP with its transforms and its tokenizer.

    Raises:
        FileNotFoundError, ValueError: there is none at this path.
    """
    made = trained_model(model, device, tokenizer, activation)
    if made.model.kind != "clip":
        raise ValueError(
            f"model: expected a CLIP, whose features can be compared, got one of {made.model.kind}"
        )
    return made


def trained_model(
    model: str, device: torch.device, tokenizer: Path | None, activation: str | None = None
) -> Created:
    """A trained model of any kind with its transforms and its tokenizer.

    Raises:
        FileNotFoundError, ValueError: there is none at this path.
    """
    path = Path(model)
    if not path.exists() and not Path(f"{path}.safetensors").exists():
        raise FileNotFoundError(
            f"model: expected the folder of a run or a checkpoint, there is no {model}"
        )
    return create(path, device=device, tokenizer=tokenizer, activation=activation)


def nearest(
    query: Tensor, features: Tensor, paths: Sequence[Path], top: int, without: Path | None = None
) -> list[Hit]:
    """The `top` images of largest dot product with the query, the nearest first.

    Args:
        query: float32 [dim].
        features: float32 [n, dim].
        paths: of the n images; of equal scores the first counts as nearer.
        without: an image that is not to be found, the one that is searched by.
    """
    scores = features @ query
    own = None if without is None else without.resolve()
    order = scores.argsort(descending=True, stable=True).tolist()
    hits = (Hit(paths[row], scores[row].item()) for row in order)
    return [hit for hit in hits if own is None or hit.path.resolve() != own][:top]


def _captions(source: Path | None) -> dict[str, str]:
    """The first caption of each image, by its path as it is written."""
    if source is None:
        return {}
    captions: dict[str, str] = {}
    for pair in read_pairs(source)[0]:
        captions.setdefault(Path(pair.image).as_posix(), pair.caption)
    return captions


def _upright(path: Path) -> Image:
    """An image as it is looked at: turned as its camera says, on white."""
    return open_rgb(path.read_bytes(), lambda image: turned(image, RgbConversion()))


def turned(image: Image, convert: Callable[[Image], Image]) -> Image:
    """A Pillow image turned as its camera says, and converted."""
    # In place, because a copy has no format, which says how some 16-bit greys were widened.
    require("PIL.ImageOps").exif_transpose(image, in_place=True)
    return convert(image)


def parse(options: Sequence[str], prog: str = "fastvlp search") -> Search:
    """The command that ``options`` spell."""
    return tyro.cli(Search, args=list(options), prog=prog)
