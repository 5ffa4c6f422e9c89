"""fastvlp: fast, exact and small kernels for vision-language pretraining.

`fastvlp.ops` holds the operators, `fastvlp.losses` the modules a trainer uses in their place.
`fastvlp.EmaModel` keeps a momentum copy of a model, `fastvlp.optim` has optimisers that update it.
`fastvlp.FeatureQueue` keeps momentum features of earlier batches.
`fastvlp.GradCache` takes exact steps on batches whose activations do not fit into memory.
`python -m fastvlp.info` prints what was built and what would run on this machine.
"""

from importlib.metadata import PackageNotFoundError, version

from . import losses, ops, optim
from .grad_cache import GradCache
from .nn.ema_model import EmaModel, EmaWarmup
from .nn.feature_queue import FeatureQueue

try:
    __version__ = version("fastvlp")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "EmaModel",
    "EmaWarmup",
    "FeatureQueue",
    "GradCache",
    "losses",
    "ops",
    "optim",
    "__version__",
]
