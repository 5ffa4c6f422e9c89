"""WebDataset shards: reading sources of pairs, writing, indexing."""

from .write import Sample, read_shard, write_shard

__all__ = ["Sample", "read_shard", "write_shard"]
