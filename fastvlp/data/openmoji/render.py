"""SVG drawings to PNG images on white."""

from __future__ import annotations

import io
from pathlib import Path

from fastvlp.data.optional import require


def render_png(svg: Path, size: int) -> bytes:
    """Render an SVG file to an RGB PNG of ``size`` x ``size`` pixels on a white background."""
    image = require("PIL.Image")
    # At 96 dots per inch a CSS pixel is a pixel; with none given, lengths in points are refused.
    # System fonts would make the images depend on the machine; the drawings have no text.
    rgba = require("resvg_py").svg_to_bytes(
        svg_path=str(svg),
        width=size,
        height=size,
        background="white",
        dpi=96,
        skip_system_fonts=True,
    )
    png = io.BytesIO()
    image.open(io.BytesIO(rgba)).convert("RGB").save(png, format="PNG")
    return png.getvalue()
