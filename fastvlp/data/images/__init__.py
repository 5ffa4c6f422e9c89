"""Decoding, conversion and augmentation of images."""
