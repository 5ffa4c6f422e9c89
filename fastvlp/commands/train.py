"""``fastvlp train``: train a model, or go on training one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastvlp.commands import train_options
from fastvlp.train.config import (
    TrainAlbef,
    TrainClip,
    TrainConfig,
    TrainVilt,
    from_mapping,
    read_yaml,
)
from fastvlp.train.presets import PRESETS

# Settings of each system that can be trained.
SYSTEMS: dict[str, type[TrainConfig]] = {"clip": TrainClip, "vilt": TrainVilt, "albef": TrainAlbef}

_USAGE = """usage: {prog} {{{systems}}} OPTIONS

Trains a model. With no options, on the built-in OpenMoji images on the machine at hand.
Under torchrun, all its processes train one model. {prog} SYSTEM --help lists the options.
"""

_SOURCES = """Two more options decide the defaults of all others: --preset paper takes the settings
of the system's paper, and --config FILE those in a YAML file, such as a run's config.yaml."""


@dataclass
class Train:
    """A parsed command."""

    config: TrainConfig

    def run(self) -> dict[str, float]:
        """Train, and return the scores."""
        from fastvlp.train.run import train

        return train(self.config)


@dataclass
class _Sources:
    """Where settings come from that are not given as options."""

    preset: str = "openmoji"
    """Defaults to start from: openmoji, or paper."""

    config: Path | None = None
    """YAML file of settings, over the preset. Options count over both."""


def parse(options: Sequence[str], prog: str = "fastvlp train") -> Train:
    """The command that ``options`` spell: a system, then its settings."""
    if not options or options[0] in ("-h", "--help"):
        print(_USAGE.format(prog=prog, systems=",".join(SYSTEMS)))
        raise SystemExit(0 if options else 2)
    system, *options = options
    if system not in SYSTEMS:
        raise ValueError(f"expected one of {', '.join(SYSTEMS)} to train, got {system!r}")
    # The sources decide the defaults, so they are read before everything else.
    helped = [option for option in options if option in ("-h", "--help")]
    others = [option for option in options if option not in helped]
    sources, rest = tyro.cli(_Sources, args=others, prog=prog, return_unknown_args=True)
    cls = SYSTEMS[system]
    config = train_options.parse(
        cls,
        [*rest, *helped],
        _defaults(system, sources),
        prog=f"{prog} {system}",
        description=f"{cls.__doc__}\n\n{_SOURCES}",
    )
    return Train(config)


def _defaults(system: str, sources: _Sources) -> TrainConfig:
    presets = PRESETS[system]
    if sources.preset not in presets:
        raise ValueError(f"preset: expected one of {', '.join(presets)}, got {sources.preset!r}")
    values = dict(presets[sources.preset])
    where = f"preset {sources.preset}"
    if sources.config is not None:
        values |= read_yaml(sources.config)
        where = str(sources.config)
    return from_mapping(SYSTEMS[system], values, where)


if __name__ == "__main__":
    parse(sys.argv[1:], "python -m fastvlp.commands.train").run()
