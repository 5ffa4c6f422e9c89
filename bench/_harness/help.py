"""How the benchmarks' options are explained."""

import argparse


class HelpFormatter(argparse.HelpFormatter):
    """Each default once, written as it would be typed, and `N,...` where several are taken."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said, default = action.help or "", action.default
        unsaid = default is None or default is argparse.SUPPRESS or isinstance(default, bool)
        if unsaid or "default" in said or default == 0 and "0:" in said:
            return said
        text = ",".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{said} (default {text})".strip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        several = getattr(action.type, "takes_several", False)
        return action.dest.upper() + (",..." if several else "")
