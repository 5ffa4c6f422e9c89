"""Encoders that several models are built of."""
