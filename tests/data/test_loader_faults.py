"""What the loader leaves out: broken samples, images that fail late, and how many are too many."""

import gzip

import pytest
import torch
from fastvlp_tests import photo_shards
from fastvlp_tests.loader_cases import content, indices
from fastvlp_tests.tiny_vocabularies import bert_vocabulary

from fastvlp.data.images.base import BrokenImages
from fastvlp.data.images.integrity import ImageFault
from fastvlp.data.loader import TooManyBroken
from fastvlp.data.shards.write import Sample, write_shard
from fastvlp.data.text import BertTokenizer
from fastvlp.data.text.masked import MaskingTokenizer


def broken_set(folder, count=400):
    """Every twentieth sample broken, in six ways; a cut shard and a gzipped one besides."""

    def sample(n):
        if n % 20 != 7:
            return photo_shards.good(n)
        return Sample(f"{n:06d}", photo_shards.broken(n // 20).members)

    pattern = photo_shards.write(folder, count, 40, sample)
    write_shard(folder / "x.tar", [photo_shards.good(count + n) for n in range(5)])
    whole = (folder / "x.tar").read_bytes()
    (folder / "y.tar").write_bytes(gzip.compress(whole))
    (folder / "x.tar").write_bytes(whole[: whole.index(f"caption {count + 4}".encode())])
    return pattern


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_a_broken_set_yields_every_good_sample_once(make, tmp_path, backend):
    pattern = broken_set(tmp_path)
    loader = make(pattern, "albef_pretrain", 16, backend=backend, last_batch="partial")
    batches = list(loader)
    good = [f"caption {n}" for n in range(404) if n >= 400 or n % 20 != 7]
    assert sorted(c for b in batches for c in b.captions) == sorted(good)
    assert [len(batch) for batch in batches] == [16] * 24
    assert loader.skipped == {
        "image": 11, "caption": 6, "missing part": 3, "damaged shard": 1, "refused shard": 1,
    }  # fmt: skip
    named = "\n".join(map(str, loader.faults))
    assert "y.tar" in named and "gzip" in named and "000404" in named and "000007" in named


def test_too_many_broken_samples_are_fatal(make, tmp_path):
    pattern = broken_set(tmp_path)
    with pytest.raises(TooManyBroken, match=r"20 of 404 samples.*000007"):
        make(pattern, max_broken=0.04)
    (tmp_path / "y.tar").rename(tmp_path / "z.tar")
    with pytest.raises(TooManyBroken, match="1 of 1 shards"):
        make(tmp_path / "z.tar")
    with pytest.raises(TooManyBroken, match="no good sample"):
        make(tmp_path / "z.tar", max_broken=1.0)


@pytest.mark.parametrize("backend", ["pil", "dali"])
def test_an_image_that_fails_to_decode_costs_only_itself(make, tmp_path, backend):
    def sample(n):
        return (
            photo_shards.good(n, jpg=photo_shards.undecodable(n))
            if n == 11
            else photo_shards.good(n)
        )

    pattern = photo_shards.write(tmp_path, 40, 40, sample)
    loader = make(pattern, "clip_eval", backend=backend)
    batches = list(loader)
    assert [len(batch) for batch in batches] == [8, 7, 8, 8, 8]
    assert indices(batches) == [n for n in range(40) if n != 11]
    assert loader.skipped == {"image": 1} and "000011.jpg" in str(loader.faults[0])
    assert content(loader) == content(batches) and loader.skipped == {"image": 1}
    sure = make(pattern, "clip_eval", backend=backend, verify="decode")
    assert sure.samples == 39 and [len(batch) for batch in sure] == [8] * 4 + [7]
    with pytest.raises(TooManyBroken, match="1 of 40 samples are broken"):
        list(make(pattern, "clip_eval", max_broken=0.01))


@pytest.mark.parametrize("backend", ["pil", "dali"])
@pytest.mark.parametrize(
    ("of", "side"), [("clip_train", 32), ("albef_pretrain", 32), ("vilt_finetune", 64)]
)
def test_a_batch_without_images_has_the_shapes_of_others(make, tmp_path, backend, of, side):
    def sample(n):
        return photo_shards.good(n, jpg=photo_shards.undecodable(n))

    vocabulary = bert_vocabulary(tmp_path)
    masking = MaskingTokenizer(BertTokenizer(vocabulary))
    pattern = photo_shards.write(tmp_path, 2, 2, sample)
    loader = make(pattern, of, 1, masking, backend=backend, max_broken=1.0)
    for batch in loader:
        assert len(batch) == 0 and batch.captions == []
        assert batch.images.shape == (0, 3, side, side) and batch.images.dtype == torch.float32
        assert batch.ids.shape == batch.index.shape == (0,)
        for ids in (batch.tokens.ids, batch.tokens.masked_ids, batch.tokens.labels):
            assert ids.shape == (0, 2) and ids.dtype == torch.int64
        if of == "vilt_finetune":
            assert (
                batch.pixel_mask.shape == (0, side, side) and batch.pixel_mask.dtype == torch.bool
            )
    assert loader.skipped == {"image": 2}


def test_images_that_fail_one_after_the_other_cost_only_themselves(make, tmp_path):
    """Each attempt at a batch finds one that the attempt before did not."""
    loader = make(photo_shards.write(tmp_path, 8, 8), "clip_eval", max_broken=0.5)
    whole, batch = list(loader)[0], loader._backend.batch

    def fails(images, plan):
        if len(images) > 6:
            raise BrokenImages({1: ImageFault("late")})
        return batch(images, plan)

    loader._backend.batch = fails
    (found,) = loader
    kept = [0, *range(3, 8)]
    assert found.index.tolist() == kept and torch.equal(found.images, whole.images[kept])


def test_a_shard_that_vanishes_costs_its_samples(make, tmp_path):
    pattern = photo_shards.write(tmp_path, 60, 20)
    loader = make(pattern, "clip_eval", max_broken=0.5)
    (tmp_path / "00001.tar").unlink()
    assert indices(loader) == [*range(20), *range(40, 60)]
    assert loader.skipped == {"unreadable": 20}


def test_an_image_that_fails_on_a_gpu_costs_only_itself(make, tmp_path, monkeypatch):
    from fastvlp.data.images import dali as image_dali

    monkeypatch.setattr(image_dali, "backend", image_dali.DaliGpuBackend)

    def sample(n):
        return (
            photo_shards.good(n, jpg=photo_shards.undecodable(n))
            if n == 3
            else photo_shards.good(n)
        )

    pattern = photo_shards.write(tmp_path, 20, 20, sample)
    loader = make(pattern, "clip_eval", backend="dali")
    batches = list(loader)
    assert [len(batch) for batch in batches] == [7, 8, 4]
    assert indices(batches) == [n for n in range(20) if n != 3]
    assert loader.skipped == {"image": 1}
