"""What MkDocs does not do by itself: formulas, data flows, benchmark tables, files of the checkout.

In a page, a line `<!-- table: contrastive/itc_throughput_cpu.json -->` becomes the tables of that
file of bench/results, `<!-- plot: ... -->` its chart, and `<!-- include: CONTRIBUTING.md -->` the
text of that file. Fenced blocks of the languages `math` (LaTeX) and `flow` (see flow.py) become
MathML and SVG, so that no page loads a script or a font from elsewhere.
"""

import re
import sys
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

import flow  # noqa: E402
import mathml  # noqa: E402
import results  # noqa: E402

DIRECTIVE = re.compile(r"^<!-- (table|plot|include): (\S+) -->$", re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


def on_config(config):
    config["mdx_configs"]["pymdownx.superfences"] = {
        "custom_fences": [
            {"name": "math", "class": "math", "format": mathml.fence},
            {"name": "flow", "class": "flow", "format": flow.fence},
        ]
    }
    return config


def on_files(files, config):
    for path in results.charted():
        files.append(File.generated(config, results.chart_name(path), content=results.chart(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    def replaced(match):
        kind, name = match.groups()
        if not (ROOT / name if kind == "include" else results.FOLDER / name).is_file():
            raise PluginError(f"{page.file.src_uri}: {match.group()} names no file")
        if kind == "include":
            return relative_links((ROOT / name).read_text(), name, page)
        if kind == "table":
            return results.tables(name)
        depth = page.file.src_uri.count("/")
        return f"![Times of {name}]({'../' * depth}{results.chart_name(name)})"

    return DIRECTIVE.sub(replaced, markdown)


def relative_links(text, name, page):
    """Links of a file of the checkout as links of `page`: into docs, or else their text alone."""

    def link(match):
        label, target, anchor = match.groups()
        place = (ROOT / name).parent / target
        try:
            inside = place.resolve().relative_to(ROOT / "docs")
        except ValueError:
            return label if label.startswith("`") else f"`{label}`"
        return f"[{label}]({'../' * page.file.src_uri.count('/')}{inside.as_posix()}{anchor or ''})"

    return LINK.sub(link, text)
