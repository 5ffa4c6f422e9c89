"""Entries for several parameters, such as `rank, world_size: ...`, one by one."""

import re

import griffe

ENTRY = re.compile(r"^(?P<indent> +)(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): ")


class SeparateParameters(griffe.Extension):
    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = separated(obj.docstring.value)


def separated(text):
    """`text` with every entry for several names written once for each of them."""
    lines, out = text.splitlines(), []
    while lines:
        line = lines.pop(0)
        match = ENTRY.match(line)
        if not match:
            out.append(line)
            continue
        entry = [line[match.end() :]]
        while lines and lines[0].startswith(match["indent"] + " "):
            entry.append(lines.pop(0))
        for name in match["names"].split(", "):
            out += [f"{match['indent']}{name}: {entry[0]}", *entry[1:]]
    return "\n".join(out)
