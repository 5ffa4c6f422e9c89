"""Alternatives to fastvlp.ops.word_patch_alignment."""
