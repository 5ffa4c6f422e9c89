"""Thin models on top of the kernels.

Import the one you need: ``from fastvlp.models import clip``.
"""
