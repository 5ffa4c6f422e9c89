"""Evaluation of trained models.

Import the measure you need: ``from fastvlp.evaluate.retrieval import retrieval``.
"""
