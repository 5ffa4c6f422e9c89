"""The console command ``fastvlp``: finds the command that is named and hands it its options."""

from __future__ import annotations

import difflib
import importlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

# Of files that a command names: not there, not what they should be, or not text.
_MISTAKES = (
    FileNotFoundError, IsADirectoryError, NotADirectoryError, UnicodeDecodeError,
    json.JSONDecodeError,
)  # fmt: skip

# What each command does. The module of its name in fastvlp.commands has `parse(options, prog)`,
# which gives something to `run()`; it is imported only when its command is called.
COMMANDS = {
    "shards": "turn image–caption pairs into WebDataset shards",
    "train": "train a model, or go on training one",
    "evaluate": "retrieval, matching, zero-shot and linear-probe scores of a model",
    "search": "find the images of a folder that are nearest to a text or an image",
    "ground": "show where in an image a text lies, by an ALBEF",
    "embed": "write features of images and texts to a file",
    "export": "write a trained CLIP for open_clip or transformers",
}

_EXAMPLES = (
    "fastvlp shards captions.csv shards/ --images photos/ --split 0.9",
    "fastvlp train clip --data shards/train --eval-data shards/val",
    'fastvlp search runs/clip "a red bus" --images photos/',
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``fastvlp COMMAND OPTIONS``.

    What the user can mend ends in one message: status 2 for what is wrong with the command, its
    settings or its files, status 1 for what failed besides. A defect shows its trace.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    if arguments[0] == "--version":
        print(_versions())
        return
    name, *options = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"fastvlp: there is no command {name!r}{hint}\n\n{_usage()}", file=sys.stderr)
        raise SystemExit(2)
    try:
        command = _parse(name, options)
        command.run()
    except KeyboardInterrupt as interrupt:
        print(f"\nfastvlp {name}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        # Commands that mind signals say which one it was.
        raise SystemExit(128 + getattr(interrupt, "signum", signal.SIGINT)) from None
    except Exception as error:
        status = _status(error)
        if status is None:
            raise
        print(f"fastvlp {name}: {error}", file=sys.stderr)
        raise SystemExit(status) from error


def _status(error: Exception) -> int | None:
    """The exit status for an error whose message is what the user needs, or None for a defect."""
    if isinstance(error, _MISTAKES) or (isinstance(error, ValueError) and _is_ours(error)):
        return 2
    ours = type(error).__module__.startswith("fastvlp.")
    known = isinstance(error, (ImportError, OSError))
    if ours or known or (isinstance(error, FloatingPointError) and _is_ours(error)):
        return 1
    return None


def _is_ours(error: Exception) -> bool:
    """Whether the package itself raised it, with a message made for the user, not a library."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def _parse(name: str, options: list[str]):
    try:
        import tyro  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the command line needs tyro, which cannot be imported ({error}); "
            f'install it with: pip install -e ".[train]"'
        ) from error
    module = importlib.import_module(f"fastvlp.commands.{name}")
    return module.parse(options, f"fastvlp {name}")


def _versions() -> str:
    import torch

    import fastvlp

    python = ".".join(map(str, sys.version_info[:3]))
    return f"fastvlp {fastvlp.__version__}, torch {torch.__version__}, Python {python}"


def _usage() -> str:
    lines = ["usage: fastvlp COMMAND OPTIONS", "       fastvlp --version", "", "commands:"]
    lines += [f"  {name:10} {about}" for name, about in COMMANDS.items()]
    lines += [
        "",
        "fastvlp COMMAND --help lists the options of a command.",
        "",
        "with your own images:",
    ]
    lines += [f"  {example}" for example in _EXAMPLES]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
