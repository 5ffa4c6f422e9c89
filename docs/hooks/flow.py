"""Data flows: boxes and arrows in a fenced block to SVG.

    x: 0 0 memory  image features | [N, D]
    tile: 1 0.5 cache  logits of a tile
    x -> tile  once

A box is its name, column, row, kind and lines of text; an arrow joins two names, from side to side
or, within a column, from top to bottom. Kinds are `memory` (exists as a whole), `cache` (a tile at
a time) and `result`.
"""

import re
from html import escape

WIDTH, HEIGHT, GAP_X, GAP_Y = 176, 52, 70, 26
BOX = re.compile(r"(\w+): ([\d.]+) ([\d.]+) (memory|cache|result)  (.+)")
ARROW = re.compile(r"(\w+) -> (\w+)(?:  (.+))?")


def fence(source, language, css_class, options, md, **_):
    return f'<div class="{css_class}">{draw(source)}</div>'


def draw(source):
    """The SVG of a flow's text.

    Raises:
        ValueError: a line is neither a box nor an arrow, or an arrow's end is no box.
    """
    boxes, arrows = {}, []
    for line in filter(str.strip, source.splitlines()):
        if match := BOX.fullmatch(line.strip()):
            name, column, row, kind, text = match.groups()
            place = (float(column) * (WIDTH + GAP_X) + 4, float(row) * (HEIGHT + GAP_Y) + 16)
            boxes[name] = place, kind, text.split(" | ")
        elif (match := ARROW.fullmatch(line.strip())) and {match[1], match[2]} <= set(boxes):
            arrows.append(match.groups())
        else:
            raise ValueError(f"flow: expected a box or an arrow between boxes above, got {line!r}")
    width = max(x for (x, _), *_ in boxes.values()) + WIDTH + 4
    height = max(y for (_, y), *_ in boxes.values()) + HEIGHT + 6
    parts = [_box(*box) for box in boxes.values()]
    parts += [_arrow(boxes[a][0], boxes[b][0], label) for a, b, label in arrows]
    head = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" class="tip"/></marker></defs>'
    )
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img" '
        f'aria-label="data flow" xmlns="http://www.w3.org/2000/svg">{head}{"".join(parts)}</svg>'
    )


def _box(place, kind, lines):
    x, y = place
    middle = y + HEIGHT / 2 - (len(lines) - 1) * 8 + 4.5
    text = "".join(
        f'<text x="{x + WIDTH / 2:g}" y="{middle + 16 * i:g}">{escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    shape = f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
    return f'<g class="{kind}">{shape}{text}</g>'


def _arrow(start, end, label):
    if start[0] == end[0]:
        down = 1 if end[1] > start[1] else 0
        x1 = x2 = start[0] + WIDTH / 2
        y1, y2 = start[1] + HEIGHT * down, end[1] + HEIGHT * (1 - down)
    else:
        right = 1 if end[0] > start[0] else 0
        x1, x2 = start[0] + WIDTH * right, end[0] + WIDTH * (1 - right)
        y1, y2 = start[1] + HEIGHT / 2, end[1] + HEIGHT / 2
    line = f'<path class="arrow" d="M{x1:g} {y1:g} {x2:g} {y2:g}" marker-end="url(#tip)"/>'
    if not label:
        return line
    x, y = (x1 + x2) / 2, (y1 + y2) / 2 - 5
    return f'{line}<text class="label" x="{x:g}" y="{y:g}">{escape(label)}</text>'
