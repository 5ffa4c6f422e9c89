"""Random bits for the layers above the operators: a function of seed and counter."""

from ._core.philox import philox

__all__ = ["philox"]
