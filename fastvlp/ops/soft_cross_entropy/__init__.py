"""Cross-entropy against labels and a teacher's soft targets."""

from .api import select_rows, soft_cross_entropy, soft_cross_entropy_reference

__all__ = ["select_rows", "soft_cross_entropy", "soft_cross_entropy_reference"]
