"""``fastvlp shards``: image–caption pairs to WebDataset shards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastvlp.data.optional import require
from fastvlp.data.shards.build import Result, make_shards
from fastvlp.data.shards.sources import Columns, Kind, read_pairs

# Between lines of progress where there is no terminal for a bar.
_SECONDS = 10.0


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

    split: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Which splits to take of a file of Karpathy's: for training on COCO, train restval."""

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
    """Seed of the order."""

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

    def run(self) -> Result:
        """Make the shards and print what came of it."""
        kind = None if self.kind == "auto" else self.kind
        columns = Columns(self.image_column, self.caption_column, self.id_column)
        quotes = {"auto": None, "yes": True, "no": False}[self.quotes]
        pairs, broken = read_pairs(self.source, kind, columns, quotes=quotes, splits=self.split)
        here = self.source if self.source.is_dir() else self.source.parent
        rich = require("rich.progress")
        bar = rich.Progress(
            *rich.Progress.get_default_columns(),
            rich.TextColumn("{task.completed}/{task.total} rows"),
            rich.TextColumn("{task.fields[broken]} broken"),
            disable=not self.progress,
        )
        with bar:
            task = bar.add_task("shards", total=len(pairs), broken=len(broken))
            bad, done, said = len(broken), 0, time.monotonic()

            def advance(rows: int, faulty: int) -> None:
                nonlocal bad, done, said
                bad, done = bad + faulty, done + rows
                bar.update(task, advance=rows, broken=bad)
                unseen = self.progress and not bar.console.is_terminal
                if unseen and time.monotonic() - said >= _SECONDS:
                    print(f"{done} of {len(pairs)} rows, {bad} broken", flush=True)
                    said = time.monotonic()

            result = make_shards(
                pairs,
                broken,
                self.images or here,
                self.output,
                per_shard=self.per_shard,
                seed=self.seed,
                check=self.check,
                max_broken=self.max_broken,
                retry_broken=self.retry_broken,
                allow_outside=self.allow_outside,
                workers=self.workers,
                advance=advance,
            )
        _report(result)
        return result


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
