"""Loads the compiled operators and says why when it cannot."""

import importlib.util
import json
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch

from .._tracing import constant_result

REMEDY = "install a C++20 compiler and run `pip install -e .` again"
# Those of csrc/schema.cpp: a library without one of them was built from older sources.
OPERATORS = (
    "contrastive_statistics", "contrastive_gradients", "contrastive_sigmoid", "contrastive_loss",
    "contrastive_loss_gradients",
    "contrastive_cuda_statistics", "contrastive_cuda_gradient", "contrastive_cuda_sigmoid",
    "cross_attention_forward", "cross_attention_backward", "cuda_kernels_unavailable",
    "release_cpu_buffers", "cpu_instruction_sets", "ema_update", "ema_update_again",
    "adamw_ema", "last_exceeding", "cpu_instruction_set", "soft_cross_entropy_losses",
    "soft_cross_entropy_gradients", "soft_cross_entropy_losses_and_gradients",
    "soft_cross_entropy_rows", "soft_cross_entropy_column_sums",
    "soft_cross_entropy_weight_gradient",
    "word_patch_alignment", "word_patch_alignment_gradients", "momentum_contrastive",
    "transform_images", "matmul", "add_matmul", "matmul_available",
)  # fmt: skip


# Tracing must see the answers of the two loaders as constants, not trace into the loading.
@constant_result
def load() -> tuple[str, ...]:
    """Registers the compiled operators with torch; returns the reasons why not (empty: done)."""
    return _load()


def missing_schemas() -> tuple[str, ...]:
    """Reasons why the operators have no schemas, which all implementations are registered under.

    Here they come with the compiled operators. A build without those can define them alone: Triton
    kernels need no more.
    """
    return load()


@constant_result
def load_cuda() -> tuple[str, ...]:
    """The same for the CUDA library, which needs a CUDA build of torch besides."""
    return _load_cuda()


@cache
def _load() -> tuple[str, ...]:
    library = _library("_C")
    if library is None:
        why = build_info().get("unbuilt", "the compiled library fastvlp/_C is missing")
        return (f"the kernels were not compiled: {why}; {REMEDY}",)
    if fault := _registering_fault(library, "compiled"):
        return (fault,)
    if missing := [name for name in OPERATORS if not hasattr(torch.ops.fastvlp, name)]:
        return (
            f"the compiled library {library.name} is older than its Python code and lacks "
            f"{', '.join(missing)}: build it again with `pip install -e .`",
        )
    return ()


@cache
def _load_cuda() -> tuple[str, ...]:
    if reasons := _load():
        return reasons
    if torch.version.cuda is None:
        return ("this torch is a CPU build",)
    library = _library("_C_cuda")
    if library is None:
        built = build_info().get("cuda", "not built")
        return (f"the CUDA library was {built}; fix that and run `pip install -e .` again",)
    fault = _registering_fault(library, "CUDA")
    return (fault,) if fault else ()


def _registering_fault(library: Path, kind: str) -> str | None:
    """Registers a library's operators with torch; what is wrong where that fails."""
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the {kind} library {library.name} does not load: {error}"
    return None


@constant_result
def instruction_set_fault() -> str | None:
    """What is wrong with the environment's FASTVLP_CPU_ISA; None where nothing is."""
    forced = os.environ.get("FASTVLP_CPU_ISA")
    if not forced or _load():
        return None
    usable = instruction_sets()
    if forced in usable:
        return None
    return (
        f"FASTVLP_CPU_ISA: expected one of {', '.join(usable)}, which this CPU runs, got "
        f"{forced!r}; unset it to use the fastest"
    )


def instruction_sets() -> list[str]:
    """Those that the compiled operators have and this CPU runs, the fastest first."""
    return list(_instruction_sets())


@cache
def _instruction_sets() -> tuple[str, ...]:
    return tuple(torch.ops.fastvlp.cpu_instruction_sets().split(","))


def build_info() -> dict[str, str]:
    """What the build recorded: torch, cuda, cuda_architectures, cpu, compiler.

    Of a build without kernels "unbuilt", the reason why; empty where nothing was ever built.
    """
    library = _library("_C")
    facts = library.with_name("build_info.json") if library else _installed("build_info.json")
    return json.loads(facts.read_text()) if facts and facts.exists() else {}


def _installed(name: str) -> Path | None:
    """A file that the build put beside the package, which an editable install keeps elsewhere."""
    try:
        return Path(str(distribution("fastvlp").locate_file(f"fastvlp/{name}")))
    except PackageNotFoundError:
        return None


def _library(name: str) -> Path | None:
    spec = importlib.util.find_spec(f"fastvlp.{name}")
    return Path(spec.origin) if spec and spec.origin else None
