"""Alternatives to fastvlp.ops.cross_attention."""
