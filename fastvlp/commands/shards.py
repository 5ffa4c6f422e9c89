"""``fastvlp shards``: image–caption pairs to WebDataset shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastvlp.commands.progress import progress
from fastvlp.data.shards.build import Result, make_folder, make_shards
from fastvlp.data.shards.pairs import Broken, Pair
from fastvlp.data.shards.sources import Columns, Kind, read_pairs
from fastvlp.data.shards.split import split_by_image


@dataclass
class Shards:
    """Turn image–caption pairs into WebDataset shards for training.

    The source is a folder of images with text files beside them (one caption per line), a CSV, TSV
    or parquet file with a path and a caption in each row (in parquet an image in place of the path
    as well), a JSON list of objects with the same fields or one such object per line, COCO
    captions, Karpathy's splits, or Flickr30k annotations. After an interruption, the same command
    goes on where it stopped.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """The folder or file. Of parquet files also a folder of several."""

    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")]
    """Folder for the shards, made if it is not there. Images that lie in parquet files are copied
    to a temporary file in it while it goes on."""

    images: Path | None = None
    """Folder that paths of images start from and that all images lie in. By default the source, or
    the folder it is in."""

    allow_outside: bool = False
    """Read images outside of that folder, by absolute paths and "..", as well: only of a source you
    trust, since it can name any file of this machine."""

    kind: Literal["auto"] | Kind = "auto"
    """What the source is. By default told from its name and its beginning; "json" is a list of
    objects, and COCO captions and Karpathy's splits as well."""

    quotes: Literal["auto", "yes", "no"] = "auto"
    """Whether fields of CSV and TSV may be in quotes, and then hold separators and line breaks. By
    default those of CSV may, and in TSV a quote is a character like any other."""

    split: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SHARE|NAME ...")] = ()
    """A number between 0 and 1, such as 0.9: this share of the images goes to OUTPUT/train and the
    others to OUTPUT/val, with no image in both. Names: which splits to take of a file of
    Karpathy's; for training on COCO, train restval."""

    image_column: str | None = None
    """Name of the column (in JSON the field) of paths or images. By default one of the usual
    names."""

    caption_column: str | None = None
    """Name of the column of captions. By default one of the usual names."""

    id_column: str | None = None
    """Name of the column that is equal for captions of one image. By default image_id, or where
    there is none the path, and the content of images that lie in parquet files."""

    per_shard: Annotated[int, tyro.conf.arg(metavar="ROWS")] = 1000
    """Rows in a shard. Have at least a few shards for each process that will read them."""

    seed: int = 0
    """Seed of the order, and of the choice of images for validation."""

    check: bool = True
    """Decode every image to see that it is whole. Without, only its header is read."""

    max_broken: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.1
    """Stop where more than this share of all rows is broken."""

    retry_broken: bool = False
    """Make finished shards with broken rows again, after images were mended."""

    workers: int = 0
    """Threads that read and check images. By default one per CPU."""

    progress: bool = True
    """Show a progress bar."""

    def run(self) -> Result | tuple[Result, Result]:
        """Make the shards and print what came of it; two results where they are split."""
        kind = None if self.kind == "auto" else self.kind
        columns = Columns(self.image_column, self.caption_column, self.id_column)
        quotes = {"auto": None, "yes": True, "no": False}[self.quotes]
        share, names = _share_or_names(self.split)
        pairs, broken = read_pairs(self.source, kind, columns, quotes=quotes, splits=names)
        if share is None:
            result = self._make(pairs, broken, self.output)
            _report(result)
            return result
        make_folder(self.output)
        with progress("reading", len(pairs), "rows", self.progress) as advance:
            parts = split_by_image(
                pairs,
                share,
                self._images,
                self.output,
                seed=self.seed,
                allow_outside=self.allow_outside,
                workers=self.workers,
                advance=advance,
            )
        return self._make_both(*parts, broken)

    def _make_both(
        self, train: list[Pair], val: list[Pair], broken: list[Broken]
    ) -> tuple[Result, Result]:
        # The share that may be broken is of both together: one of 20 images for validation is more
        # than a share of its own would allow.
        most = int(self.max_broken * (len(train) + len(val) + len(broken)))
        trained = self._make(train, broken, self.output / "train", most)
        _report(trained)
        left = most - len(trained.broken)
        validated = self._make(val, [], self.output / "val", left)
        _report(validated)
        print(
            f"Next: fastvlp train clip --data {trained.folder} --eval-data {validated.folder}",
            flush=True,
        )
        return trained, validated

    def _make(
        self, pairs: list[Pair], broken: list[Broken], folder: Path, most: int | None = None
    ) -> Result:
        bad = len(broken)
        with progress(folder.name, len(pairs), "rows", self.progress) as done:

            def advance(rows: int, faulty: int) -> None:
                nonlocal bad
                bad += faulty
                done(rows, f"{bad} broken")

            return make_shards(
                pairs,
                broken,
                self._images,
                folder,
                per_shard=self.per_shard,
                seed=self.seed,
                check=self.check,
                max_broken=self.max_broken,
                most_broken=most,
                retry_broken=self.retry_broken,
                allow_outside=self.allow_outside,
                workers=self.workers,
                advance=advance,
            )

    @property
    def _images(self) -> Path:
        return self.images or (self.source if self.source.is_dir() else self.source.parent)


def _share_or_names(split: Sequence[str]) -> tuple[float | None, Sequence[str]]:
    """The share of images for training, or else the names of splits to take."""
    try:
        shares = [float(each) for each in split]
    except ValueError:
        return None, split
    if not split:
        return None, ()
    if len(shares) > 1 or not 0 < shares[0] < 1:
        raise ValueError(
            f"split: expected one share between 0 and 1, such as 0.9, or names of splits; "
            f"got {' '.join(split)}"
        )
    return shares[0], ()


def _report(result: Result) -> None:
    last = len(result.shards) - 1
    names = f"shard-{{000000..{last:06d}}}.tar" if last > 0 else "shard-000000.tar"
    print(f"{result.count} samples in {len(result.shards)} shards: {result.folder / names}")
    if result.broken:
        faults = ", ".join(f"{count} {fault}" for fault, count in result.faults.items())
        print(f"{len(result.broken)} broken rows ({faults}), named in broken.tsv. The first:")
        for row in result.broken[:5]:
            print(f"  {row.place}: {row.fault}: {row.detail}")


def parse(options: Sequence[str], prog: str = "fastvlp shards") -> Shards:
    """The command that ``options`` spell."""
    return tyro.cli(Shards, args=list(options), prog=prog)
