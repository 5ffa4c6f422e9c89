"""Compile everything with the versions of torch and Triton that fastvlp promises; no GPU needed.

    python tests/compatibility/check_versions.py --downloads ~/.cache/fastvlp-wheels

The native sources are compiled against the headers of each torch, and what they need of libtorch
is compared with what the oldest one has; the kernels are compiled for every GPU by each Triton.
Fetches torch wheels for their headers (those for macOS, 80 to 130 MB each: all wheels of a version
have the same) and Triton wheels (190 MB each), unpacks them in the folder of downloads and installs
nothing. The exit status is 1 when anything fails. Minutes for torch, half an hour for each Triton.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))

from fastvlp_tests import promised_names as names  # noqa: E402
from fastvlp_tests import wheels  # noqa: E402

OLDEST = "2.10"
FLAGS = (
    "-std=c++20", "-O0", "-Wall", "-Wextra", "-fPIC", "-DFASTVLP_X86",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)  # fmt: skip


def requirement(package: str, version: str) -> str:
    return package if version == "newest" else f"{package}=={version}.*"


def sources_with_torch() -> list[Path]:
    """The sources of csrc that include a header of torch, directly or not."""
    sources = sorted(p for p in (names.ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".cu"})
    language = ("-x", "c++", "-std=c++20", "-DFASTVLP_ISA=portable")
    found = []
    for source in sources:
        listed = subprocess.run(
            ["g++", *language, "-M", "-MG", source], capture_output=True, text=True, check=True
        ).stdout
        if " torch/" in listed.replace("\\\n", " "):
            found.append(source)
    return found


def compile_against(source: Path, include: Path) -> list[str]:
    """What is wrong with a source and the headers of one torch; empty where nothing is."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "built.o"
        done = subprocess.run(
            ["g++", *FLAGS, "-isystem", include, "-c", source, "-o", built],
            capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in said if "error:" in line][:3] or said[-3:]
            return errors or [f"g++ exited with {done.returncode} and said nothing"]
        needed = names.needed_of_torch(built)
    newer = sorted(needed - names.read_list(names.TORCH_LIST))
    return [f"needs {name}, which torch {OLDEST} lacks" for name in newer]


def check_torch(found: list[wheels.Wheel], jobs: int) -> Iterator[str]:
    """Prints one row for each source; gives every fault."""
    include = [w.unpack("torch/include/") / "torch" / "include" for w in found]
    if names.torch_names_of(include[0]) != names.read_list(names.TORCH_LIST):
        yield f"{names.TORCH_LIST.name} is not what torch {found[0].version} has"
    print(f"\n{'source':<36}" + "".join(f"{w.version:>9}" for w in found), flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        for source in sources_with_torch():
            wrong = list(pool.map(lambda headers, s=source: compile_against(s, headers), include))
            cells = "".join(f"{'FAILS' if w else 'ok':>9}" for w in wrong)
            print(f"{source.relative_to(names.ROOT / 'csrc')!s:<36}{cells}", flush=True)
            for wheel, lines in zip(found, wrong, strict=True):
                yield from (f"torch {wheel.version}: {line}" for line in lines)


def with_triton(wheel: wheels.Wheel, *command: str) -> list[str | Path]:
    """The command line of a Python program that imports the unpacked Triton and this checkout."""
    path = os.pathsep.join(map(str, (wheel.unpack(), names.ROOT, names.ROOT / "tests" / "support")))
    return ["env", f"PYTHONPATH={path}", "TRITON_INTERPRET=0", sys.executable, *command]


def check_triton(wheel: wheels.Wheel, oldest: bool, jobs: int, pattern: str) -> Iterator[str]:
    """Prints the register table as it grows, and its summary; gives every fault."""
    print(f"\nkernels by Triton {wheel.version}", flush=True)
    if oldest:
        listing = (
            "from fastvlp_tests import promised_names as n; "
            "print(*sorted(n.triton_names_here()), sep='\\n')"
        )
        has = subprocess.run(
            with_triton(wheel, "-c", listing), capture_output=True, text=True, check=True
        ).stdout.split()
        if set(has) != names.read_list(names.TRITON_LIST):
            yield f"{names.TRITON_LIST.name} is not what Triton {wheel.version} has"
    table = ("-m", "fastvlp.kernels", "-j", str(jobs), "-k", pattern)
    if subprocess.run(with_triton(wheel, *table)).returncode:
        yield f"Triton {wheel.version}: kernels that fail, spill or do not fit, see above"


def write_lists(torch_wheel: wheels.Wheel, triton_wheel: wheels.Wheel) -> None:
    include = torch_wheel.unpack("torch/include/") / "torch" / "include"
    names.write_list(
        names.TORCH_LIST, f"torch {OLDEST}'s stable ABI", names.torch_names_of(include)
    )
    listing = (
        "from fastvlp_tests import promised_names as n; "
        "n.write_list(n.TRITON_LIST, 'Triton 3.6', n.triton_names_here())"
    )
    subprocess.run(with_triton(triton_wheel, "-c", listing), check=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--torch", nargs="*", default=["2.10", "2.11", "2.12", "2.13", "newest"], metavar="X.Y")
    add("--triton", nargs="*", default=["3.6", "3.7", "3.8"], metavar="X.Y")
    add("--downloads", type=Path, default=Path("build/wheels"), help="where wheels are kept")
    add("--jobs", type=int, default=os.cpu_count(), help="compilers at once")
    add("--kernels", default="", metavar="REGEX", help='only some kernels, such as "sm_90 forward"')
    add("--write-lists", action="store_true", help="write the lists of names instead of checking")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    headers = ("--python-version", "3.12", *wheels.SMALLEST)
    if options.write_lists:
        write_lists(
            wheels.fetch(requirement("torch", OLDEST), options.downloads, *headers),
            wheels.fetch(requirement("triton", "3.6"), options.downloads),
        )
        return 0
    torches = [
        wheels.fetch(requirement("torch", v), options.downloads, *headers) for v in options.torch
    ]
    tritons = [wheels.fetch(requirement("triton", v), options.downloads) for v in options.triton]
    faults = list(check_torch(torches, options.jobs)) if torches else []
    for version, wheel in zip(options.triton, tritons, strict=True):
        faults += check_triton(wheel, version == "3.6", options.jobs, options.kernels)
    print("", *(faults or ["everything compiles"]), sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
