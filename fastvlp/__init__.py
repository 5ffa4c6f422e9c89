"""fastvlp: fast, exact and small kernels for vision-language pretraining.

`fastvlp.ops` holds the operators, `fastvlp.losses` the modules a trainer uses in their place.
`fastvlp.EmaModel` keeps a momentum copy of a model, `fastvlp.optim` has optimisers that update it.
`fastvlp.FeatureQueue` keeps momentum features of earlier batches.
`fastvlp.GradCache` takes exact steps on batches whose activations do not fit into memory.
`fastvlp.create` makes a model with its image transforms and its tokenizer in one call.
`python -m fastvlp.info` prints what was built and what would run on this machine.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from . import losses, nn, ops, optim
from .grad_cache import GradCache
from .nn.ema_model import EmaModel, EmaWarmup
from .nn.feature_queue import FeatureQueue

if TYPE_CHECKING:  # else on demand, below
    from . import data, evaluate, integrations, masking, models, train
    from .factory import create

try:
    __version__ = version("fastvlp")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

# Packages with dependencies of their own, imported when they are first asked for.
_ON_DEMAND = ("data", "evaluate", "integrations", "masking", "models", "train")

__all__ = [
    "EmaModel",
    "EmaWarmup",
    "FeatureQueue",
    "GradCache",
    "losses",
    "nn",
    "ops",
    "optim",
    "create",
    "data",
    "evaluate",
    "integrations",
    "masking",
    "models",
    "train",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "create":
        return import_module(f"{__name__}.factory").create
    if name in _ON_DEMAND:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
