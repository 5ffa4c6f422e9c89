"""The order of the loader: epochs, windows, ranks, and where it goes on from a state."""

import collections
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from fastvlp_tests import photo_shards
from fastvlp_tests.loader_cases import content, indices

from fastvlp.data.rng import bits, permutation, uniforms
from fastvlp.data.shards.dataset import EpochOrder


def test_epochs_and_seeds_differ_and_repeat(make, shards):
    loader = make(shards, "albef_pretrain", seed=1)
    first, second = content(loader), content(loader)
    assert loader.epoch == 2
    assert [i for i, *_ in first] != [i for i, *_ in second]
    pixels = [dict((i, p) for i, p, _ in run) for run in (first, second)]
    both = set(pixels[0]) & set(pixels[1])
    assert sum(pixels[0][i] != pixels[1][i] for i in both) > 0.9 * len(both)
    loader.set_epoch(0)
    assert content(loader) == first
    assert indices(make(shards, seed=2)) != [i for i, *_ in first]


def test_the_order_is_mixed_within_windows():
    starts = np.arange(0, 1001, 50)
    order = EpochOrder(starts, seed=0, epoch=0, window=200).samples(0, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    windows = order.reshape(-1, 200) // 50
    assert [len(set(window)) for window in windows.tolist()] == [4] * 5
    assert abs(np.corrcoef(order[:200] // 1, np.arange(200))[0, 1]) < 0.2
    whole = EpochOrder(starts, 0, 0, 200)
    for begin, end in ((0, 0), (3, 17), (190, 650), (999, 1000)):
        assert np.array_equal(whole.samples(begin, end), order[begin:end])
    plain = EpochOrder(np.array([0, 0, 3, 3, 7]), 0, 0, 0)
    assert plain.samples(1, 7).tolist() == [1, 2, 3, 4, 5, 6]


def test_random_numbers_are_uniform_and_functions_of_their_place():
    random = uniforms(7, 2, np.arange(4000), 5)
    assert abs(random.mean() - 0.5) < 0.01 and abs(random.var() - 1 / 12) < 0.002
    assert np.abs(np.corrcoef(random.T) - np.eye(5)).max() < 0.06
    assert abs(np.corrcoef(random[1:, 0], random[:-1, 0])[0, 1]) < 0.06
    assert np.array_equal(uniforms(7, 2, np.array([11]), 5)[0], random[11])
    assert bits(0, 0, np.array([0]), 2).tolist() != bits(0, 1, np.array([0]), 2).tolist()
    assert sorted(permutation(0, 0, 1, 50)) == list(range(50))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("last", ["drop", "partial", "wrap"])
def test_ranks_share_an_epoch(make, shards, world, last):
    options = {"last_batch": last, "seed": 4, "world_size": world}
    runs = [list(make(shards, rank=rank, **options)) for rank in range(world)]
    assert len({len(run) for run in runs}) == 1
    assert len(runs[0]) == len(make(shards, rank=0, **options))
    counts = collections.Counter(i for run in runs for i in indices(run))
    total = len(runs[0]) * 8 * world
    if last == "drop":
        assert len(counts) == total == 96 and set(counts.values()) == {1}
    elif last == "partial":
        assert len(counts) == 100 and set(counts.values()) == {1}
        sizes = [len(run[-1]) for run in runs]
        assert max(sizes) - min(sizes) <= 1
    else:
        assert len(counts) == 100 and sum(counts.values()) == total
        assert {len(batch) for run in runs for batch in run} == {8}


def test_a_rank_may_get_nothing_of_the_last_step(make, shards):
    runs = [
        list(make(shards, "clip_eval", 33, world_size=3, rank=rank, last_batch="partial"))
        for rank in range(3)
    ]
    assert [[len(batch) for batch in run] for run in runs] == [[33, 1], [33, 0], [33, 0]]
    assert runs[1][1].images.shape == (0, 3, 32, 32) and runs[1][1].tokens.shape == (0,)


def test_wrapping_repeats_a_small_set(make, shards):
    (batch,) = make(shards, batch_size=250, last_batch="wrap")
    assert max(collections.Counter(batch.index.tolist()).values()) == 3


def test_a_state_resumes_at_the_next_sample_on_any_ranks(make, shards):
    options = {"seed": 9, "last_batch": "partial"}
    whole = make(shards, "albef_pretrain", **options)
    expected = [*content(whole), *content(whole)]
    begun = make(shards, "albef_pretrain", **options)
    seen = []
    for _, batch in zip(range(5), begun, strict=False):
        seen += content([batch])
    state = pickle.loads(pickle.dumps(begun.state_dict()))
    assert seen == expected[:40] and state["place"] == 40
    alone = make(shards, "albef_pretrain", **options)
    alone.load_state_dict(state)
    assert len(alone) == 8
    assert content(alone) + content(alone) == expected[40:]
    # On three ranks with other batches: a step is the ranks' batches one after another.
    ranks = [make(shards, "albef_pretrain", 5, rank=r, world_size=3, **options) for r in range(3)]
    for each in ranks:
        each.load_state_dict(state)
    steps = zip(*ranks, strict=True)
    assert [row for step in steps for row in content(step)] == expected[40:100]
    # Giving an iteration up and beginning another one continues as well.
    assert content(begun) == expected[40:100]


def test_a_state_of_other_data_is_refused(make, shards, tmp_path):
    loader = make(shards, seed=1)
    state = loader.state_dict()
    for change, word in (
        ({"seed": 2}, "seed"),
        ({"version": 9}, "version"),
        ({"window": 1}, "window"),
    ):
        with pytest.raises(ValueError, match=word):
            loader.load_state_dict(state | change)
    other = make(photo_shards.write(tmp_path, 40), seed=1)
    with pytest.raises(ValueError, match="samples"):
        other.load_state_dict(state)


def test_the_place_may_not_be_set_while_iterating(make, shards):
    loader = make(shards)
    with pytest.raises(RuntimeError, match="while it was being iterated"):
        for _ in loader:
            loader.set_epoch(3)


RUN = """
import pathlib, pickle, sys
import numpy as np
from fastvlp.data import Loader
from fastvlp.data.images.recipes import recipe
shards, state, log, cache = sys.argv[1:]
loader = Loader(shards, recipe("albef_pretrain", size=32), 8, seed=6, last_batch="partial",
                threads=2, backend="pil", device="cpu", cache_dir=cache)
state = pathlib.Path(state)
if state.exists():
    loader.load_state_dict(pickle.loads(state.read_bytes()))
for batch in loader:
    with open(log, "ab") as file:
        for index, image in zip(batch.index.tolist(), batch.images):
            file.write(np.int64(index).tobytes() + image.numpy().tobytes())
    state.with_suffix(".new").write_bytes(pickle.dumps(loader.state_dict()))
    state.with_suffix(".new").rename(state)
    print(index, flush=True)
"""


def test_a_killed_run_resumes_exactly(make, shards, cache, tmp_path):
    state, log = tmp_path / "state", tmp_path / "log"
    command = [sys.executable, "-c", RUN, shards, str(state), str(log), str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        for _ in range(4):
            assert process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    size = 8 + 4 * 3 * 32 * 32
    steps = pickle.loads(state.read_bytes())["place"] // 8
    assert 4 <= steps < 13
    # What came after the last state is done again.
    os.truncate(log, 8 * steps * size)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    unbroken = make(shards, "albef_pretrain", seed=6, last_batch="partial")
    expected = b"".join(np.int64(i).tobytes() + pixels for i, pixels, _ in content(unbroken))
    assert log.read_bytes() == expected
