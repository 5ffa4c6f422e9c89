"""Shards, and loaders of them, for the tests of the loader."""

import pytest
from fastvlp_tests import photo_shards
from fastvlp_tests.loader_cases import SMALL, lengths

from fastvlp.data import Loader


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """100 samples in 7 shards."""
    return photo_shards.write(tmp_path_factory.mktemp("shards"), 100, 16)


@pytest.fixture
def make(cache):
    """Makes loaders and closes them."""
    made = []

    def build(shards, of="clip_train", batch_size=8, tokenizer=lengths, **options):
        options = {"cache_dir": cache, "threads": 2, "backend": "pil", "device": "cpu"} | options
        made.append(Loader(shards, SMALL.get(of, of), batch_size, tokenizer, **options))
        return made[-1]

    yield build
    for each in made:
        each.close()
