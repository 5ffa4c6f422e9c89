"""Indexes of shards: good samples, every fault by name, and the cache."""

import gzip
import io
import json
import os
import shutil
import tarfile
import time

import numpy as np
import pytest
from fastvlp_tests import photo_shards

from fastvlp.data.images.integrity import ImageFault, decode_rgb, fault, jpeg_header
from fastvlp.data.shards import dataset as shard_set
from fastvlp.data.shards import index as shard_index
from fastvlp.data.shards.dataset import ShardSet, expand
from fastvlp.data.shards.index import index_of, scan_shard
from fastvlp.data.shards.write import Sample, write_shard


def indexed(path, samples, **options):
    write_shard(path, samples)
    return scan_shard(str(path), **options)


def test_samples_lie_where_the_index_says(tmp_path):
    pattern = photo_shards.write(tmp_path, 7, 4)
    shards = ShardSet(expand(pattern), cache_dir=tmp_path / "cache")
    assert len(shards) == 7 and not shards.faults
    for n in range(7):
        raw, sample = shards.read(n), photo_shards.good(n)
        assert raw.image == sample.members["jpg"]
        assert raw.caption == f"caption {n}" and raw.index == n
        assert raw.id == (str(n // 6) if n % 3 == 0 else None)
        assert shards.name(n) == (raw.shard, f"{n:06d}.jpg")


@pytest.mark.parametrize(
    "number, kind, word",
    [
        (0, "image", "decoded"),
        (1, "image", "empty"),
        (2, "image", "decoded"),
        (3, "caption", "empty"),
        (4, "caption", "UTF-8"),
        (5, "missing part", "no image"),
    ],
)
def test_a_broken_sample_costs_itself_and_is_named(tmp_path, number, kind, word):
    samples = [photo_shards.good(10), photo_shards.broken(number), photo_shards.good(11)]
    index = indexed(tmp_path / "a.tar", samples)
    (found,) = index.faults
    assert len(index) == 2 and found.kind == kind and found.is_sample
    assert word in found.reason and f"{number:06d}" in str(found) and "a.tar" in str(found)


def test_more_faults_of_samples(tmp_path):
    good = photo_shards.good(1).members
    index = indexed(
        tmp_path / "a.tar",
        [
            Sample("a", {"jpg": good["jpg"]}),
            Sample("b", good | {"png": good["jpg"]}),
            Sample("c", good | {"id": b"\xff"}),
            Sample("d", good | {"json": b"{}", "id": b"x"}),
        ],
    )
    assert [(f.kind, f.key) for f in index.faults] == [
        ("missing part", "a"), ("repeated part", "b"), ("id", "c"),
    ]  # fmt: skip
    assert len(index) == 1


def test_a_cut_shard_keeps_its_whole_samples(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path, [photo_shards.good(n) for n in range(5)])
    entry = scan_shard(str(path)).entries[3]
    os.truncate(path, int(entry["image"]) + 100)
    index = scan_shard(str(path))
    assert len(index) == 3
    assert [f.kind for f in index.faults] == ["damaged shard"]
    assert index.faults[0].key == "000003"


def test_a_gzipped_shard_is_refused_by_name(tmp_path):
    path = tmp_path / "a.tar"
    write_shard(path, [photo_shards.good(0)])
    path.write_bytes(gzip.compress(path.read_bytes()))
    (found,) = scan_shard(str(path)).faults
    assert found.kind == "refused shard" and "gunzip" in str(found) and not found.is_sample


def tar(path, members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return scan_shard(str(path))


def test_files_that_are_no_part_of_a_sample_are_passed_over(tmp_path):
    members = [
        ("README", b"about"),
        ("LICENSE.txt", b"mine"),
        ("notes.md", b"x"),
        (".DS_Store", b""),
    ]
    for n in range(3):
        members += [(f"d/._{n}.jpg", b"x"), (f"d/{n}.jpg", photo_shards.jpeg(n))]
        members += [(f"d/._{n}.txt", b"x"), (f"d/{n}.txt", b"caption")]
    members += [("__MACOSX/._d", b""), ("d/Thumbs.db", b""), ("alone.txt", b"a caption")]
    index = tar(tmp_path / "a.tar", members)
    assert len(index) == 3
    assert [(f.kind, f.key) for f in index.faults] == [("missing part", "alone")]
    # A sample may have such a name.
    index = tar(tmp_path / "b.tar", [("readme.jpg", photo_shards.jpeg(0)), ("readme.txt", b"a")])
    assert len(index) == 1 and not index.faults


def test_a_shard_of_other_files_is_refused_with_the_reason(tmp_path):
    (found,) = tar(tmp_path / "a.tar", [("README", b"a"), ("image", b"b")]).faults
    assert found.kind == "refused shard" and "expected members KEY.jpg and KEY.txt" in found.reason


def test_captions_in_other_members(tmp_path):
    image = photo_shards.jpeg(0)
    texts = {
        "a": {"caption": b"of a"},
        "b": {"json": json.dumps({"url": "u", "caption": "of b é"}).encode()},
        "c": {"json": b'{"caption": "not me"}', "txt": b"of c"},
        "d": {"json": b'{"text": "of d"}'},
        "e": {"json": b'{"title": "no"}'},
        "f": {"json": b"[" * 100_000},
        "g": {"json": b'{"caption": "\\ud800"}'},
        "h": {"json": b'{"caption": " "}'},
    }
    path = tmp_path / "a.tar"
    write_shard(path, [Sample(key, {"jpg": image} | text) for key, text in texts.items()])
    shards = ShardSet([str(path)], cache_dir=tmp_path / "c")
    assert [shards.read(n).caption for n in range(4)] == ["of a", "of b é", "of c", "of d"]
    assert [(f.kind, f.key) for f in shards.faults] == [("caption", key) for key in "efgh"]
    assert 'no text under "caption" or "text"' in shards.faults[0].reason


def test_an_index_is_made_once_until_the_shard_changes(tmp_path, monkeypatch):
    path, cache = str(tmp_path / "a.tar"), tmp_path / "cache"
    samples = [photo_shards.good(0), photo_shards.broken(3)]
    write_shard(tmp_path / "a.tar", samples)
    first = index_of(path, cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr(shard_index, "scan_shard", lambda *_: pytest.fail("scanned again"))
        again = index_of(path, cache_dir=cache)
    assert np.array_equal(again.entries, first.entries) and again.faults == first.faults
    write_shard(tmp_path / "a.tar", samples[:1])
    assert not index_of(path, cache_dir=cache).faults
    for file in (cache / "shard-index").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert len(index_of(path, cache_dir=cache)) == 1


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    write_shard(tmp_path / "a.tar", [photo_shards.good(0)])
    (tmp_path / "file").write_text("")
    assert len(index_of(str(tmp_path / "a.tar"), cache_dir=tmp_path / "file")) == 1


def test_expands_patterns(tmp_path):
    for name in ("a-00", "a-01", "a-02", "b"):
        (tmp_path / f"{name}.tar").write_text("")
    base = str(tmp_path)

    def names(given):
        return [os.path.basename(path)[:-4] for path in expand(given)]

    assert names(f"{base}/a-{{00..02}}.tar") == ["a-00", "a-01", "a-02"]
    assert names(f"{base}/{{b,a-00}}.tar") == ["b", "a-00"]
    assert names(f"{base}/a-*.tar") == ["a-00", "a-01", "a-02"]
    assert names(tmp_path) == ["a-00", "a-01", "a-02", "b"]
    assert names([f"{base}/b.tar", tmp_path / "a-01.tar"]) == ["b", "a-01"]
    with pytest.raises(FileNotFoundError, match="a-03"):
        expand(f"{base}/a-{{02..03}}.tar")
    with pytest.raises(ValueError, match="more than once"):
        expand([f"{base}/b.tar", f"{base}/b*.tar"])
    with pytest.raises(ValueError, match="at least one"):
        expand([])


def test_braces_expand_as_in_bash_and_names_with_braces_open(tmp_path):
    for name in ("a-1", "a-2", "a-3", "b-08", "b-09", "b-10", "{1..3}", "{x,y}"):
        (tmp_path / f"{name}.tar").write_text("")
    (tmp_path / "{p,q}[1]").mkdir()
    (tmp_path / "{p,q}[1]" / "a-1.tar").write_text("")
    base = str(tmp_path)

    def names(pattern):
        return [os.path.relpath(path, base)[:-4] for path in expand(f"{base}/{pattern}")]

    assert names("a-{3..1}.tar") == ["a-3", "a-2", "a-1"]
    assert names("a-{1..3..2}.tar") == ["a-1", "a-3"]
    assert names("b-{08..10}.tar") == ["b-08", "b-09", "b-10"]
    assert names("{b-{10..09},a-{1,2}}.tar") == ["b-10", "b-09", "a-1", "a-2"]
    assert names("{1..3}.tar") == ["{1..3}"] and names("{x,y}.tar") == ["{x,y}"]
    assert names("{p,q}[1]/a-{1..1}.tar") == names("{p,q}[1]/*.tar") == ["{p,q}[1]/a-1"]
    with pytest.raises(FileNotFoundError, match="nothing is there"):
        names("a-{1..3.tar")


def test_a_folder_of_compressed_shards_says_what_to_do(tmp_path):
    (tmp_path / "a.tar.gz").write_text("")
    with pytest.raises(FileNotFoundError, match=r"'a.tar.gz' is compressed.*gunzip"):
        expand(tmp_path)
    (tmp_path / "a.tar.gz").rename(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match=r"expected \.tar files in .*there are none"):
        expand(tmp_path)


def test_headers_of_jpegs():
    grey = photo_shards.encoded(photo_shards.photograph(0).convert("L"))
    cmyk = photo_shards.encoded(photo_shards.photograph(0).convert("CMYK"))
    progressive = photo_shards.encoded(photo_shards.photograph(0), progressive=True)
    assert jpeg_header(grey).plain and jpeg_header(progressive).plain
    assert (jpeg_header(progressive).width, jpeg_header(progressive).height) == (96, 72)
    assert not jpeg_header(cmyk).plain
    assert jpeg_header(grey[:40]) is None and jpeg_header(b"no") is None
    assert not jpeg_header(grey[:-1]).ends and jpeg_header(grey + bytes(8)).ends


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_whole_and_cut_images_are_told_apart(kind):
    whole = photo_shards.encoded(photo_shards.photograph(3), kind)
    assert fault(whole) == "" and fault(whole, decode=True) == ""
    cut = whole[: len(whole) // 2]
    assert "decoded" in fault(cut) and "decoded" in fault(cut, decode=True)
    with pytest.raises(ImageFault):
        decode_rgb(cut)


def test_a_flipped_bit_in_a_png_is_seen():
    content = bytearray(photo_shards.encoded(photo_shards.photograph(3), "PNG"))
    content[len(content) // 2] ^= 1
    assert "decoded" in fault(bytes(content))


def test_other_modes_become_rgb_as_pillow_makes_them():
    for mode in ("L", "LA", "P", "RGBA", "1"):
        image = photo_shards.photograph(1).convert(mode)
        content = photo_shards.encoded(image, "PNG")
        assert np.array_equal(decode_rgb(content), np.array(image.convert("RGB")))


def test_shards_begin_with_any_of_them(tmp_path):
    pattern = photo_shards.write(tmp_path, 9, 2)
    paths = expand(pattern)
    seen = []
    one = ShardSet(paths, cache_dir=tmp_path / "c", start=3, progress=lambda *n: seen.append(n))
    assert seen == [(i, 5) for i in range(1, 6)]
    other = ShardSet(paths, cache_dir=tmp_path / "c")
    assert one.starts.tolist() == other.starts.tolist() == [0, 2, 4, 6, 8, 9]
    assert one.fingerprint() == other.fingerprint()
    shutil.move(paths[0], tmp_path / "x.tar")
    moved = ShardSet([str(tmp_path / "x.tar"), *paths[1:]], cache_dir=tmp_path / "c")
    assert moved.fingerprint() != one.fingerprint()


def test_progress_within_a_shard_is_told(tmp_path, monkeypatch):
    """A shard that is scanned for long counts with the share that is done."""
    path = expand(photo_shards.write(tmp_path, 8, 8))[0]
    examined = shard_index._examined

    def slow(*args):
        time.sleep(0.05)
        return examined(*args)

    monkeypatch.setattr(shard_index, "_examined", slow)
    monkeypatch.setattr(shard_set, "_BEAT", 0.02)
    seen = []
    ShardSet([path], cache_dir=tmp_path / "c", progress=lambda *n: seen.append(n))
    shares = [done for done, _ in seen]
    assert seen[-1] == (1, 1) and {count for _, count in seen} == {1}
    assert shares == sorted(shares) and len(set(shares)) > 4
    assert all(0 <= share < 1 for share in shares[:-1])


def test_a_shard_that_shrank_is_an_error_of_the_read(tmp_path):
    pattern = photo_shards.write(tmp_path, 2, 2)
    shards = ShardSet(expand(pattern), cache_dir=tmp_path / "c")
    os.truncate(shards.paths[0], 800)
    with pytest.raises(OSError, match="shorter"):
        shards.read(1)
    assert shards.name(1)[0] == shards.paths[0]


def test_an_error_does_not_wait_for_the_other_shards(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{n}.tar") for n in range(9)]
    begun = []

    def index_of(path, *_):
        begun.append(path)
        if path == paths[0]:
            raise OSError(f"{path}: cannot be read")
        time.sleep(0.2)

    monkeypatch.setattr(shard_set, "index_of", index_of)
    with pytest.raises(OSError, match=r"0\.tar: cannot be read"):
        ShardSet(paths)
    assert len(begun) < len(paths)
