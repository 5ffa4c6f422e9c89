"""Alternatives to fastvlp.ops.contrastive."""
