"""The console command ``fastvlp``: finds the command that is named and hands it its options."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence

# What each command does. The module of its name in fastvlp.commands has `parse(options, prog)`,
# which gives something to `run()`; it is imported only when its command is called.
COMMANDS = {
    "train": "train a model, or go on training one",
    "evaluate": "retrieval and zero-shot classification of a trained model",
    "shards": "turn image–caption pairs into WebDataset shards",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``fastvlp COMMAND OPTIONS``; errors of use end in one message and status 2 or 1."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    name, *options = arguments
    if name not in COMMANDS:
        print(f"fastvlp: there is no command {name!r}\n\n{_usage()}", file=sys.stderr)
        raise SystemExit(2)
    try:
        command = _parse(name, options)
        command.run()
    except KeyboardInterrupt as interrupt:
        print(f"\nfastvlp {name}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        # Commands that mind signals say which one it was.
        raise SystemExit(128 + getattr(interrupt, "signum", signal.SIGINT)) from None
    except (ImportError, OSError, ValueError) as error:
        # Of these the message is what the user needs; a defect shows its trace.
        print(f"fastvlp {name}: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def _parse(name: str, options: list[str]):
    try:
        import tyro  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the command line needs tyro, which cannot be imported ({error}); "
            f'install it with: pip install "fastvlp[train]"'
        ) from error
    module = importlib.import_module(f"fastvlp.commands.{name}")
    return module.parse(options, f"fastvlp {name}")


def _usage() -> str:
    lines = ["usage: fastvlp COMMAND OPTIONS", "", "commands:"]
    lines += [f"  {name:10} {about}" for name, about in COMMANDS.items()]
    lines += ["", "fastvlp COMMAND --help lists the options of a command."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
