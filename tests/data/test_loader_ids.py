"""The loader's ids are those of the samples as they are written; what is wholly bad says why."""

import pytest
from fastvlp_tests import photo_shards

from fastvlp.data import Loader
from fastvlp.data.loader import TooManyBroken
from fastvlp.data.shards.write import Sample, write_shard


def load(path, cache, **options):
    options = {"backend": "pil", "device": "cpu", "threads": 1, "cache_dir": cache} | options
    return Loader(path, "clip_eval", 8, **options)


def test_ids_are_compared_as_they_are_written(tmp_path):
    ids = ["7", "007", " 7", "7\n", "0", "00", "9" * 18, "9" * 19]
    image = photo_shards.jpeg(0)
    samples = [
        Sample(str(n), {"jpg": image, "txt": b"a", "id": written.encode()})
        for n, written in enumerate([*ids, "7", "007"])
    ]
    write_shard(tmp_path / "a.tar", samples)
    loader = load(tmp_path / "a.tar", tmp_path / "cache")
    found = [i for batch in loader for i in batch.ids.tolist()]
    loader.close()
    assert len(set(found[: len(ids)])) == len(ids) and min(found) >= 0
    assert found[-2:] == found[:2]
    assert (found[0], found[4], found[6]) == (7, 0, 10**18 - 1)


def test_no_good_sample_gives_the_first_reasons(tmp_path):
    write_shard(tmp_path / "a.tar", [Sample("k", {"jpg": photo_shards.jpeg(0)})])
    with pytest.raises(TooManyBroken, match=r"no good sample.*'k': the sample has no caption"):
        load(tmp_path / "a.tar", tmp_path / "cache", max_broken=1.0)
