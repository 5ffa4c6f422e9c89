"""The scan of tar files: where tarfile sees members, and past damages where it sees none."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlp.data.tar_scan import Damage, Member, name_before, refusal, scan

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


@settings(max_examples=60)
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
