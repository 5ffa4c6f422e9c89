"""What may import what: the rules of the tree, as functions of module names.

A module is named as it is imported (`fastvlp.kernels.contrastive.forward` for a file of kernels/).
Each rule looks at one import and says what is wrong with it, or gives None.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# What each layer may import besides itself.
LAYERS = {
    "_autograd": set(),
    "_tracing": set(),
    "kernels": {"_tracing"},
    "distributed": {"_autograd"},
    "ops": {"kernels", "_autograd", "_tracing", "distributed"},
    "losses": {"distributed", "ops"},
    "integrations": {"losses", "nn"},
    "nn": {"ops", "_autograd", "_tracing", "distributed"},
    "splitmix": set(),
    "masking": {"splitmix"},
    "models": {"losses", "nn", "ops", "distributed", "masking"},
    "data": {"ops", "masking", "splitmix"},
    "evaluate": {"ops", "distributed"},
    "grad_cache": {"distributed"},
    "info": {"ops"},
    "optim": {"nn", "ops"},
    "train": {
        "data", "distributed", "evaluate", "grad_cache", "losses", "masking", "models", "nn", "ops",
        "optim",
    },
    "factory": {"data", "models", "train"},
    "commands": {"data", "evaluate", "factory", "models", "train"},
    "cli": {"commands", "data"},
    "__main__": {"cli"},
}  # fmt: skip
# Packages of which the parts are siblings: they import no other part but these, and why.
SIBLINGS = {
    "fastvlp.kernels": {"_core": "what all share"},
    "fastvlp.ops": {
        "_core": "what all share",
        "autocast": "so is autocast",
        "compiled": "so are the libraries",
    },
    "fastvlp.models": {
        "layers": "the encoders that models are built of",
        "base": "saving and loading",
        "files": "saving and loading",
    },
}
SIBLINGS_ALLOWED = {
    ("fastvlp.kernels.momentum_contrastive", "fastvlp.kernels.contrastive"): "one softplus",
    ("fastvlp.ops.soft_cross_entropy", "fastvlp.ops.matmul"): "the head's matmuls",
    ("fastvlp.models.checkpoints", "fastvlp.models.albef"): "it loads into them",
    ("fastvlp.models.checkpoints", "fastvlp.models.clip"): "it loads into them",
    ("fastvlp.models.checkpoints", "fastvlp.models.vilt"): "it loads into them",
}
# Files outside of fastvlp.ops that name torch.ops.fastvlp, and why.
NATIVE_OPERATORS = {"fastvlp.data.images.transforms": "one function writes images into a batch"}
FORBIDDEN_IN_KERNELS = ("torch.autograd", "torch.distributed", "torch.nn")
# Files that import by a name known only when they run, and why.
DYNAMIC = {
    "fastvlp": "packages on demand",
    "fastvlp.cli": "one command's module alone",
    "fastvlp.data.optional": "optional dependencies",
    "fastvlp.kernels._core.aot": "its list of kernel modules",
    "fastvlp.ops.cross_attention.self_attention": "flash-attn and xformers, where they are",
}


@dataclass(frozen=True)
class Import:
    """`module` imports `name` (a module, or something in one)."""

    module: str
    name: str


def read(root: Path) -> dict[str, Path]:
    """The files of fastvlp/ and kernels/ by module."""
    files = [*(root / "fastvlp").rglob("*.py"), *(root / "kernels").rglob("*.py")]
    links = root / "fastvlp" / "kernels"  # of an installation in place
    return {module_of(f, root): f for f in files if not f.is_relative_to(links)}


def module_of(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "fastvlp")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(module: str, text: str, is_package: bool) -> Iterator[Import]:
    """Everything that a module imports, relative imports resolved."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*prefix, *filter(None, [node.module])])
            yield from (Import(module, f"{base}.{alias.name}") for alias in node.names)


def layer(name: str) -> str | None:
    """The layer of a module or of something in it; None for the package itself and for others."""
    parts = name.split(".")
    return parts[1] if parts[0] == "fastvlp" and len(parts) > 1 else None


def goes_upward(each: Import) -> str | None:
    """An import of a layer that does not lie below, or an unknown layer."""
    here, there = layer(each.module), layer(each.name)
    if here is None or there is None:
        return None
    if here not in LAYERS:
        return f"{here} is a layer that no rule knows"
    if there == here or there in LAYERS[here]:
        return None
    return f"{here} may not import {there}"


def is_private_elsewhere(each: Import) -> str | None:
    """An import of something private from outside of the package that it belongs to."""
    parts = each.name.split(".")
    for place, part in enumerate(parts):
        if part.startswith("_") and not part.startswith("__"):
            owner = ".".join(parts[:place])
            inside = each.module == owner or each.module.startswith(owner + ".")
            if parts[0] == "fastvlp" and not inside:
                return f"{part} is private to {owner}"
    return None


def is_a_siblings(each: Import) -> str | None:
    """An import from one part of a package into another, which know nothing of each other."""
    for package, shared in SIBLINGS.items():
        here, there = (_part(name, package) for name in (each.module, each.name))
        if here is None or there is None or here == there or there in shared:
            continue
        if here in shared:
            return f"{package}.{here} is shared and may not know {there}"
        if (f"{package}.{here}", f"{package}.{there}") not in SIBLINGS_ALLOWED:
            return f"{here} and {there} are siblings in {package}"
    return None


def _part(name: str, package: str) -> str | None:
    rest = name.removeprefix(package + ".")
    return None if rest == name else rest.split(".")[0]


def is_beyond_a_kernel(each: Import) -> str | None:
    """Autograd, process groups or modules in a kernel."""
    if layer(each.module) == "kernels" and each.name.startswith(FORBIDDEN_IN_KERNELS):
        return "kernels know neither autograd nor process groups nor modules"
    return None


def native_operators(text: str) -> list[int]:
    """The lines that name the compiled operators, where torch has them."""
    names = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute)]
    return [n.lineno for n in names if ast.unparse(n) in ("torch.ops.fastvlp", "ops.fastvlp")]


RULES = (goes_upward, is_private_elsewhere, is_a_siblings, is_beyond_a_kernel)


def dynamic_imports(text: str) -> list[int]:
    """The lines that import by a name known only when they run."""
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    names = ("__import__", "import_module", "importlib.import_module")
    return [call.lineno for call in calls if ast.unparse(call.func) in names]


def circles(graph: dict[str, Iterable[str]]) -> list[list[str]]:
    """The modules that import each other, directly or not; one list for each circle."""
    reached = {}
    for start in graph:
        todo, seen = list(graph[start]), set()
        while todo:
            at = todo.pop()
            if at in graph and at not in seen:
                seen.add(at)
                todo += graph[at]
        reached[start] = seen
    found = {tuple(sorted(b for b in seen if a in reached[b])) for a, seen in reached.items()}
    return [list(each) for each in sorted(found) if each]
