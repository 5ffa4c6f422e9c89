"""The reader of pairs, at the path it had before `fastvlp.data.shards`; the code is there."""

from fastvlp.data.shards.sources import read_pairs

__all__ = ["read_pairs"]
