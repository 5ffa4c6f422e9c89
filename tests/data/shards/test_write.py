"""Shards: what is written is read back, by webdataset too, and never half a file is left."""

import os
import signal
import subprocess
import sys
import tarfile

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.data.shards.write import (
    Sample,
    atomic_file,
    read_shard,
    remove_partial_files,
    write_shard,
)


def samples_of(n: int) -> list[Sample]:
    return [
        Sample(f"{i:06d}", {"txt": f"caption {i} é".encode(), "png": bytes([i]) * i})
        for i in range(n)
    ]


_key = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=12)
_members = st.dictionaries(
    st.sampled_from(["png", "txt", "json", "seg.png"]), st.binary(), min_size=1
)


@settings(deadline=None, max_examples=40)
@given(content=st.dictionaries(_key, _members, max_size=6))
def test_reads_back_what_was_written(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("shard") / "a.tar"
    samples = [Sample(key, members) for key, members in content.items()]
    record = write_shard(path, samples)
    assert list(read_shard(path)) == samples
    assert record.count == len(samples)
    assert record.matches(path.parent)


def test_webdataset_reads_the_same_samples(tmp_path):
    path = tmp_path / "a.tar"
    samples = samples_of(5)
    write_shard(path, samples)
    seen = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [s["__key__"] for s in seen] == [s.key for s in samples]
    assert [{k: s[k] for k in ("txt", "png")} for s in seen] == [s.members for s in samples]


def test_headers_are_ustar_and_equal_samples_give_equal_bytes(tmp_path):
    write_shard(tmp_path / "a.tar", samples_of(3))
    write_shard(tmp_path / "b.tar", samples_of(3))
    content = (tmp_path / "a.tar").read_bytes()
    assert content == (tmp_path / "b.tar").read_bytes()
    assert content[257:265] == b"ustar\x0000"
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert all(not member.pax_headers and member.mtime == 0 for member in tar)


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "k" * 98])
def test_refuses_keys_that_readers_misread(tmp_path, key):
    with pytest.raises(ValueError, match="expected a key without dots"):
        write_shard(tmp_path / "a.tar", [Sample(key, {"txt": b""})])
    assert os.listdir(tmp_path) == []


def test_reading_a_damaged_shard_raises_where_it_is_damaged(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path, samples_of(5))
    content = path.read_bytes()
    at = content.index(b"000002.txt")
    path.write_bytes(content[:at] + bytes(512) + content[at + 512 :])
    with pytest.raises(ValueError, match=f"damaged at byte {at}"):
        list(read_shard(path))


def test_refuses_a_key_twice(tmp_path):
    with pytest.raises(ValueError, match="'k' occurs twice"):
        write_shard(tmp_path / "a.tar", [Sample("k", {"txt": b"1"}), Sample("k", {"txt": b"2"})])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_record_tells_a_damaged_shard(tmp_path, damage):
    path = tmp_path / "a.tar"
    record = write_shard(path, samples_of(4))
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        content[700] ^= 1
        path.write_bytes(content)
    assert not record.matches(tmp_path)


def test_an_error_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.tar"
    old = write_shard(path, samples_of(2))

    def broken():
        yield from samples_of(1)
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        write_shard(path, broken())
    assert old.matches(tmp_path)
    assert os.listdir(tmp_path) == ["a.tar"]


def test_a_killed_writer_leaves_only_a_partial_file(tmp_path):
    script = (
        "import os, signal, sys, pathlib\n"
        "from fastvlp.data.shards import Sample, write_shard\n"
        "def samples():\n"
        "    yield Sample('a', {'txt': b'x' * 100_000})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_shard(pathlib.Path(sys.argv[1]), samples())\n"
    )
    path = tmp_path / "a.tar"
    process = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert process.returncode == -signal.SIGKILL
    left = os.listdir(tmp_path)
    assert len(left) == 1 and left[0].endswith(".partial")
    remove_partial_files(tmp_path)
    assert os.listdir(tmp_path) == []


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "a"
    with atomic_file(path) as first, atomic_file(path) as second:
        for _ in range(100):
            first.write(b"1" * 1000)
            second.write(b"2" * 1000)
    # The inner one is done first, so the outer one is the last to be moved over it.
    assert path.read_bytes() == b"1" * 100_000
    assert os.listdir(tmp_path) == ["a"]
