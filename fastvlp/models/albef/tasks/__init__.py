"""ALBEF's downstream tasks."""

from . import classification, grounding, rerank, retrieval, vqa

__all__ = ["classification", "grounding", "rerank", "retrieval", "vqa"]
