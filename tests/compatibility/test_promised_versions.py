"""The sources keep to what torch 2.10 and Triton 3.6 have, whatever version is installed.

`python tests/compatibility/check_versions.py` compiles everything with the versions themselves.
"""

import pytest
from fastvlp_tests import promised_names as names
from fastvlp_tests import test_files

from fastvlp.ops import compiled

check_versions = test_files.load("compatibility/check_versions.py")
CSRC = [p for p in (names.ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu"}]
KERNELS = sorted((names.ROOT / "kernels").rglob("*.py"))


def newer(used, has):
    return {name: sorted(places) for name, places in used.items() if name not in has}


def test_native_code_names_what_the_oldest_torch_has():
    has = names.read_list(names.TORCH_LIST) | names.shim_names()
    used = names.torch_names_used(p for p in CSRC if p != names.SHIM)
    assert newer(used, has) == {}, "torch 2.10 lacks these; define them in common/stable_abi.h"
    assert {"::Tensor", "STD_TORCH_CHECK", "torch/csrc/stable/library.h"} <= used.keys()


def test_what_the_shim_defines_is_used_through_it():
    for path in CSRC:
        if path != names.SHIM and names.torch_names_used([path]).keys() & names.shim_names():
            assert names.SHIM.name in path.read_text(), f"{path} must include {names.SHIM.name}"


def test_the_shim_defines_only_what_the_oldest_torch_lacks():
    has = names.read_list(names.TORCH_LIST)
    assert not names.shim_names() & has
    assert newer(names.torch_names_used([names.SHIM]), has).keys() == names.shim_names()


@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_the_libraries_need_only_what_the_oldest_torch_exports(name):
    """What headers newer than 2.10 call must not depend on the version they belong to."""
    library = compiled._library(name)
    if name == "_C_cuda" and library is None:
        pytest.skip("_C_cuda is not built")
    of_torch = names.needed_of_torch(library, "-D")
    assert of_torch - names.read_list(names.TORCH_LIST) == set()
    assert "torch_call_dispatcher" in of_torch


@pytest.mark.parametrize(
    "output, wanted",
    [
        ("a.cpp:1: note: here\na.cpp:2:3: error: no\nlast line", ["a.cpp:2:3: error: no"]),
        ("one\ntwo\n\nthree\nfour\n", ["two", "three", "four"]),
        ("", ["g++ exited with 4 and said nothing"]),
    ],
)
def test_a_compiler_that_fails_is_a_fault_whatever_it_says(tmp_path, monkeypatch, output, wanted):
    compiler = tmp_path / "g++"
    compiler.write_text(
        f"#!/bin/sh\n[ $LC_ALL = C ] || exit 0\ncat {tmp_path / 'output'} >&2\nexit 4\n"
    )
    compiler.chmod(0o755)
    (tmp_path / "output").write_text(output)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert check_versions.compile_against(tmp_path / "a.cpp", tmp_path) == wanted


def test_kernels_name_what_the_oldest_triton_has():
    has = names.read_list(names.TRITON_LIST)
    used = names.triton_names_used(KERNELS)
    assert newer(used, has) == {}, "Triton 3.6 lacks these"
    assert {"tl.dot", "triton.next_power_of_2", ".to"} <= used.keys()
