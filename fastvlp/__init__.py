"""fastvlp: fast, exact and small kernels for vision-language pretraining.

`fastvlp.ops` holds the operators, `fastvlp.losses` the modules a trainer uses in their place.
`python -m fastvlp.info` prints what was built and what would run on this machine.
"""

from importlib.metadata import PackageNotFoundError, version

from . import losses, ops

try:
    __version__ = version("fastvlp")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["losses", "ops", "__version__"]
