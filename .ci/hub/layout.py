"""Write fastvlp's operators as a kernel of the Hugging Face kernels hub: `layout.py [FOLDER]`.

    FOLDER/build.toml                   edition 5
    FOLDER/README.md                    the card
    FOLDER/build/torch-cuda/            Triton kernels, and plain PyTorch where none can run
    FOLDER/build/torch-cpu/             plain PyTorch

Each variant is a package of its own: fastvlp.ops, nn, losses and optim with what they import, all
imports relative, and torch operators in the variant's own namespace, whose name ends in a digest of
the sources. Versions therefore coexist in a process, beside each other and beside fastvlp. Compiled
operators are left out: `.ci/hub/compiled.py` defines their schemas, which Triton kernels need.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME, VERSION, LICENSE = "fastvlp", 0, "Apache-2.0"  # 0 until the interface is stable
BACKENDS = ("cpu", "cuda")
ROOTS = ("ops", "nn", "losses", "optim", "grad_cache")
# A class or function of the package itself, by the module that it is in.
FROM_MODULES = {
    "grad_cache": ("GradCache",),
    "nn.ema_model": ("EmaModel",),
    "nn.feature_queue": ("FeatureQueue",),
}

BUILD_TOML = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = [{", ".join(f'"{each}"' for each in BACKENDS)}]

[torch-noarch]
"""

CARD = f"""\
---
library_name: kernels
license: {LICENSE.lower()}
---

# fastvlp

Operators for vision-language pretraining: contrastive losses in bounded memory, attention of packed
text to images, cross-entropy over a vocabulary without its logits, and others. On CUDA devices
Triton kernels run; where there is none for a device or dtype, plain PyTorch does. The compiled CPU
and CUDA kernels come with the package fastvlp alone.
"""

_INIT = '''\
"""fastvlp's operators; `ops.explain` says which implementation runs, and why not the others."""

{imports}

__all__ = [
{names}
]
'''

# For versions of kernels that look for the package in a folder of the kernel's name.
_COMPATIBLE = '''\
"""The same as the package in the folder above."""

import importlib.util
import sys
from pathlib import Path

_NAME = "{id}"
if _NAME not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).parents[1] / "__init__.py")
    sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_NAME])
__all__ = sys.modules[_NAME].__all__
globals().update({{name: getattr(sys.modules[_NAME], name) for name in __all__}})
'''


def write(folder: Path) -> list[Path]:
    """Write the layout to a folder, over an older one; gives the variants' folders.

    Raises:
        ValueError: there is something else in the folder.
    """
    if folder.exists() and not (folder / "build.toml").exists() and any(folder.iterdir()):
        raise ValueError(
            f"folder: expected a new one, or one that this script wrote before, got {folder}"
        )
    sources = collect()
    unique = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:10]
    shutil.rmtree(folder / "build", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.toml").write_text(BUILD_TOML)
    (folder / "README.md").write_text(CARD)
    return [write_variant(folder / "build", each, sources, unique) for each in BACKENDS]


def write_variant(build: Path, backend: str, sources: dict[str, str], unique: str) -> Path:
    """One variant with its metadata.json."""
    variant, namespace = build / f"torch-{backend}", f"_{NAME}_{backend}_{unique}"
    files = {path: in_namespace(text, namespace) for path, text in sources.items()}
    files[f"{NAME}/__init__.py"] = _COMPATIBLE.format(id=namespace)
    for path, text in files.items():
        (variant / path).parent.mkdir(parents=True, exist_ok=True)
        (variant / path).write_text(text)
    metadata = {
        "name": NAME,
        "id": namespace,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {path: digest(text) for path, text in sorted(files.items())},
        },
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def collect() -> dict[str, str]:
    """The files of a variant by their paths in it, without a namespace."""
    modules = modules_of(ROOT / NAME) | {
        f"kernels.{name}" if name else "kernels": path
        for name, path in modules_of(ROOT / "kernels").items()
    }
    wanted = [each for each in modules if each.split(".")[0] in (*ROOTS, "kernels")]
    found: dict[str, Path] = {}
    while wanted:
        module = wanted.pop()
        if module in found:
            continue
        found[module] = modules[module]
        wanted += imported(module, modules)
    files = {}
    for module, path in found.items():
        name = "/".join(module.split("."))
        package = path.name == "__init__.py"
        text = relative(path.read_text(), module if package else module.rpartition(".")[0])
        files[f"{name}/__init__.py" if package else f"{name}.py"] = text
    files["__init__.py"] = init()
    files["ops/compiled.py"] = Path(__file__).with_name("compiled.py").read_text()
    files["ops/schemas.py"] = schemas()
    return files


def modules_of(folder: Path) -> dict[str, Path]:
    """The modules of a package by their dotted names below it, "" for itself."""
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imported(module: str, modules: dict[str, Path]) -> list[str]:
    """The modules of the package that one of them imports, anywhere in it, and their packages."""
    path = modules[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or is_own(node.module)):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            below = (node.module or "") if node.level else node.module[len(NAME) + 1 :]
            source = ".".join(filter(None, [*(above if node.level else []), below]))
            names |= {source, *(f"{source}.{alias.name}".strip(".") for alias in node.names)}
    known = {name for name in names if name in modules} - {""}
    parents = {name.rpartition(".")[0] for name in known} - {""}
    return sorted(known | parents)


def is_own(module: str) -> bool:
    return module == NAME or module.startswith(f"{NAME}.")


def relative(text: str, package: str) -> str:
    """A module's text with its absolute imports of the package as relative ones."""
    dots = "." * (len(package.split(".")) + 1 if package else 1)
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and not node.level and is_own(node.module):
            old, new = f"from {node.module} ", f"from {dots}{node.module[len(NAME) + 1 :]} "
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(old, new, 1)
    return "\n".join(lines)


def in_namespace(text: str, namespace: str) -> str:
    """A module's text with its torch operators in another namespace."""
    text = re.sub(rf"\btorch\.ops\.{NAME}\b", f"torch.ops.{namespace}", text)
    return re.sub(rf"\b{NAME}::", f"{namespace}::", text).replace("{NAMESPACE}", namespace)


def init() -> str:
    """The variant's own __init__.py: the operators, the modules, and some classes by name."""
    tree = ast.parse((ROOT / NAME / "ops" / "__init__.py").read_text())
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    operators = sorted(set(names) - {"packing"})
    modules = [each for each in ROOTS if each not in FROM_MODULES]
    lines = [f"from . import {', '.join(sorted(modules))}"]
    lines += [f"from .{module} import {', '.join(each)}" for module, each in FROM_MODULES.items()]
    lines += ["from .ops import (", *(f"    {name}," for name in operators), ")"]
    public = sorted({*operators, *modules, *(n for each in FROM_MODULES.values() for n in each)})
    return _INIT.format(
        imports="\n".join(lines), names="\n".join(f'    "{name}",' for name in public)
    )


def schemas() -> str:
    """A module with the schemas of csrc/schema.cpp."""
    source = re.sub(r"//[^\n]*", "", (ROOT / "csrc" / "schema.cpp").read_text())
    found = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', source)
    assert len(found) == source.count("m.def("), "a schema that is no string literal"
    parts = ["".join(re.findall(r'"([^"]*)"', each)) for each in found]
    listed = "\n".join(f"    {part!r}," for part in parts)
    return (
        '"""The schemas of the operators, and the namespace that they are in."""\n\n'
        f'NAMESPACE = "{{NAMESPACE}}"\nSCHEMAS = (\n{listed}\n)\n'
    )


if __name__ == "__main__":
    try:
        print(*write(Path(sys.argv[1] if len(sys.argv) > 1 else "build/hub")), sep="\n")
    except ValueError as error:
        sys.exit(str(error))
