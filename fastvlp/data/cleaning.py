"""The cleaning of captions, at the path it had before `fastvlp.data.text`; the code is there."""

from fastvlp.data.text.cleaning import clean_albef, clean_clip, clean_clip_cased

__all__ = ["clean_albef", "clean_clip", "clean_clip_cased"]
