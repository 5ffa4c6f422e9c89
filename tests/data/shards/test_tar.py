"""The scan of tar files: where tarfile sees members, and past damages where it sees none."""

import io
import tarfile
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.data.shards.tar import Damage, Member, name_before, refusal, scan

FORMATS = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}


def write(path, members, kind="ustar"):
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def found(path):
    with open(path, "rb") as file:
        assert refusal(file) == ""
        return list(scan(file))


names = st.text("abé/_.", min_size=1, max_size=160).filter(
    lambda n: not n.endswith("/") and not n.startswith("/") and "//" not in n
)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["gnu", "pax"]),
    members=st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=6),
)
def test_finds_what_tarfile_finds(tmp_path_factory, kind, members):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    write(path, members, kind)
    assert all(isinstance(each, Member) for each in found(path))
    content = path.read_bytes()
    got = [(m.name, content[m.offset : m.offset + m.size]) for m in found(path)]
    assert got == members


def test_folders_and_links_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("l", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x"
            tar.addfile(info)
        info = tarfile.TarInfo("d/a.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    (member,) = found(tmp_path / "a.tar")
    assert (member.name, member.size) == ("d/a.txt", 3)
    with open(tmp_path / "a.tar", "rb") as file:
        assert name_before(file, member.offset) == "d/a.txt"


def test_a_damaged_header_costs_its_own_member(tmp_path):
    path = tmp_path / "a.tar"
    write(path, [(f"{i}.txt", bytes(700)) for i in range(4)])
    second = found(path)[1]
    content = bytearray(path.read_bytes())
    content[second.offset - 500] ^= 0xFF
    path.write_bytes(content)
    members = found(path)
    damage = members.pop(1)
    assert damage == Damage(second.offset - 512, "a damaged tar header")
    assert [m.name for m in members] == ["0.txt", "2.txt", "3.txt"]


@pytest.mark.parametrize("left, name", [(512 + 300, "0.txt"), (512 + 1024 + 512 + 1, "1.txt")])
def test_a_cut_file_tells_the_member_that_is_lost(tmp_path, left, name):
    path = tmp_path / "a.tar"
    write(path, [(f"{i}.txt", bytes(700)) for i in range(4)])
    path.write_bytes(path.read_bytes()[:left])
    last = found(path)[-1]
    assert isinstance(last, Damage) and last.name == name and "ends inside" in last.reason


def test_a_file_cut_between_members_is_told_from_a_whole_one(tmp_path):
    path = tmp_path / "a.tar"
    write(path, [(f"{i}.txt", bytes(700)) for i in range(4)])
    path.write_bytes(path.read_bytes()[: 2 * (512 + 1024)])
    *members, end = found(path)
    assert len(members) == 2 and "without a tar's end" in end.reason


@pytest.mark.parametrize(
    "content, word",
    [
        (b"\x1f\x8b\x08" + bytes(600), "gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed"),
        (b"", "empty"),
        (b"<html>" * 200, "no tar"),
    ],
)
def test_what_is_no_tar_is_refused_with_the_reason(tmp_path, content, word):
    (tmp_path / "a.tar").write_bytes(content)
    with open(tmp_path / "a.tar", "rb") as file:
        assert word in refusal(file)


def six(path):
    """A tar of six members of 3072 bytes each, its bytes, and where each header is."""
    write(path, [(f"{i}.txt", bytes([i + 1]) * 2500) for i in range(6)])
    return path.read_bytes(), [m.offset - 512 for m in found(path)]


def split(path, content):
    path.write_bytes(content)
    members = found(path)
    damages = [each for each in members if isinstance(each, Damage)]
    return [m.name[0] for m in members if isinstance(m, Member)], damages


def test_a_zeroed_header_costs_its_own_member(tmp_path):
    content, headers = six(tmp_path / "a.tar")
    for number in (0, 3, 5):
        at = headers[number]
        zeroed = content[:at] + bytes(512) + content[at + 512 :]
        names, damages = split(tmp_path / "b.tar", zeroed)
        assert names == [name for name in "012345" if name != str(number)]
        assert damages == [Damage(at, "a damaged tar header")]


def test_zeros_in_place_of_members_are_read_past_and_named(tmp_path):
    content, headers = six(tmp_path / "a.tar")
    begin, end = headers[2], headers[4]
    names, (damage,) = split(
        tmp_path / "b.tar", content[:begin] + bytes(end - begin) + content[end:]
    )
    assert names == ["0", "1", "4", "5"] and damage.offset == begin
    assert f"{end - begin} bytes of zeros before the next member" in damage.reason
    begin = headers[2] + 700
    names, (damage,) = split(tmp_path / "b.tar", content[:begin] + bytes(len(content) - begin))
    assert names == ["0", "1", "2"] and damage.offset == headers[3]
    assert "zeros to the end of the file" in damage.reason
    names, (damage,) = split(tmp_path / "b.tar", bytes(3 << 20))
    assert not names and damage.offset == 0


@pytest.mark.parametrize("end", [None, 512, 1024])
def test_a_tars_own_end_is_no_damage(tmp_path, end):
    content, headers = six(tmp_path / "a.tar")
    whole = content if end is None else content[: headers[5] + 3072 + end]
    assert split(tmp_path / "b.tar", whole) == (list("012345"), [])


def test_archives_joined_into_one_file_are_all_read(tmp_path):
    content, headers = six(tmp_path / "a.tar")
    bare = content[: headers[5] + 3072 + 1024]
    for one, other in ((content, content), (bare, content), (content, bare)):
        names, damages = split(tmp_path / "b.tar", one + other + one)
        assert names == list("012345") * 3
        # Zeros may as well stand where members were.
        assert all("another tar was joined" in damage.reason for damage in damages)
        assert len(damages) == 2


def test_a_long_name_is_not_given_to_the_member_after_a_damage(tmp_path):
    path = tmp_path / "a.tar"
    write(path, [("l" * 150, b"1"), ("next", b"2")], "gnu")
    at = found(path)[0].offset
    content = path.read_bytes()
    path.write_bytes(content[: at - 512] + bytes(512) + content[at:])
    damage, member = found(path)
    assert damage.offset == at - 512 and member.name == "next"


def test_a_damaged_first_header_does_not_make_it_no_tar(tmp_path):
    content, _ = six(tmp_path / "a.tar")
    names, (damage,) = split(tmp_path / "b.tar", b"x" * 512 + content[512:])
    assert names == list("12345") and damage.offset == 0


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 1300), min_size=1, max_size=6),
    spans=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=3),
    fill=st.sampled_from([b"\0", b"x"]),
)
def test_no_member_is_lost_without_a_damage(tmp_path_factory, sizes, spans, fill):
    """Blocks are overwritten anywhere: what is found was there, and all that is lost is told."""
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    write(path, [(f"{i}.txt", bytes([i + 1]) * size) for i, size in enumerate(sizes)])
    whole = found(path)
    content = bytearray(path.read_bytes()[: whole[-1].offset + -(-sizes[-1] // 512) * 512])
    blocks = len(content) // 512
    for begin, end in spans:
        first, last = sorted((int(begin * blocks), int(end * blocks)))
        content[first * 512 : last * 512] = fill * ((last - first) * 512)
    # Without a block after the last member, zeros in its place would be a tar's end.
    path.write_bytes(content + b"\1" * 512 + bytes(1024))
    with open(path, "rb") as file:
        if refusal(file):
            return
        seen = list(scan(file))
    members = [each for each in seen if isinstance(each, Member)]
    assert [m for m in whole if m in members] == members
    assert len(members) == len(whole) or len(seen) > len(members)


def pax(path, records):
    """A tar whose first member has these Pax records."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind, content in (("h", b"x", records), ("a", b"0", b"1"), ("b", b"0", b"2")):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    "records",
    [
        b"9" * 5000 + b" path=x\n",
        b"5012 size=" + b"9" * 5000 + b"\n",
        "10 size=²\n".encode(),
        b"0 path=x\n",
        b"no length",
        b"6 a=b\n" * 170_000,
    ],
)
def test_odd_pax_records_neither_raise_nor_take_long(tmp_path, records):
    pax(tmp_path / "a.tar", records)
    begin = time.process_time()
    assert [each.name for each in found(tmp_path / "a.tar")] == ["a", "b"]
    assert time.process_time() - begin < 5


def test_pax_records_are_read_one_after_another(tmp_path):
    pax(tmp_path / "a.tar", b"6 a=b\n" * 3 + b"15 path=a name\n" + b"11 mtime=1\n")
    assert [each.name for each in found(tmp_path / "a.tar")] == ["a name", "b"]
