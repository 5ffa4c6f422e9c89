"""The vocabulary of a run: from a file, or learned from the captions that it trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastvlp.data.optional import require
from fastvlp.data.text import files as tokenizer_files
from fastvlp.data.text import train_wordpiece
from fastvlp.train import parallel, run_folder
from fastvlp.train.config import TrainConfig
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks.data import image_options, shard_loader

# Of what is learned from shards. Beyond these numbers more captions teach hardly any pieces.
ENTRIES, _CAPTIONS = 1 << 14, 1 << 20


def bert_vocabulary(
    path: Path | None, captions: Sequence[str], clean: Callable[[str], str] | None = None
) -> Path | list[str] | None:
    """What a BertTokenizer is made from: the file given, else what the captions teach, else None,
    BERT's own vocabulary."""
    if path is not None:
        return tokenizer_files.for_bert(path)
    if not captions:
        return None
    return train_wordpiece(captions, clean=clean).entries


def bert_from_shards(
    config: TrainConfig, recipe: str, ranks: Ranks, clean: Callable[[str], str] | None = None
) -> Path:
    """The file of a BertTokenizer for shards: the one given, else one learned from the captions."""
    if config.tokenizer is not None:
        return tokenizer_files.for_bert(config.tokenizer)

    def learn(captions: list[str]):
        return train_wordpiece(captions, ENTRIES, clean=clean)

    return learned(config, recipe, "vocab.txt", learn, ranks)


def learned(
    config: TrainConfig,
    recipe: str,
    name: str,
    learn: Callable[[list[str]], Any],
    ranks: Ranks,
) -> Path:
    """The file in the run's folder with the tokenizer that `learn` makes of the shards' captions.

    All ranks index the shards together. The first one then learns it when the run begins, from at
    most a million captions that are spread evenly over the data; all ranks, and the run when it
    goes on, read the file.
    """
    file = config.folder / name

    def is_there() -> bool:
        return file.is_file() and bool(run_folder.checkpoints(config.folder))

    if parallel.from_first(is_there, ranks):
        return file
    loader = shard_loader(config.data, recipe, {}, 1, None, ranks, **image_options(config))

    def make() -> None:
        captions = _captions(loader, config.progress)
        print(f"tokenizer: learning from {len(captions)} captions", flush=True)
        tokenizer = learn(captions)
        tokenizer.save(file)
        print(
            f"tokenizer: {tokenizer.vocab_size} entries, saved in {file}; another one can be "
            f"given by --tokenizer",
            flush=True,
        )

    try:
        parallel.from_first(make, ranks, takes_long=True)
    finally:
        loader.close()
    return file


def _captions(loader: Any, progress: bool) -> list[str]:
    with _progress(progress) as advance:
        return list(advance(loader.captions(_CAPTIONS), min(loader.samples, _CAPTIONS)))


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[Iterator[str], int], Iterator[str]]]:
    rich = require("rich.progress")
    bar = rich.Progress(transient=True)
    # Without a terminal even a bar that is gone leaves an empty line.
    bar.disable = not (shown and bar.console.is_terminal)
    with bar:
        yield lambda captions, total: bar.track(captions, total, description="captions")
