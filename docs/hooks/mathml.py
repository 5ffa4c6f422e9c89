"""Formulas: LaTeX in a fenced block to MathML, which browsers draw without a script."""

from latex2mathml.converter import convert


def fence(source, language, css_class, options, md, **_):
    lines = [line for line in source.split("\n\n") if line.strip()]
    return "".join(
        f'<div class="{css_class}">{convert(line, display="block")}</div>' for line in lines
    )
