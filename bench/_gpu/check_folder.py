"""The folder that travels to the machine with the GPU, where there is no network.

`prepare` copies sources, built libraries and the list of tests, and fills a Triton cache by dry
runs of the whole command: every launch is compiled by the Triton of that machine. The libraries
use torch's stable ABI and no Python API: they serve any Python and every torch from 2.10 on. The
sources of csrc travel too and are built there if the libraries do not load.

What a cached kernel's key holds: the kernel's source with its line number, the arguments'
specialisation, options, target, environment, the version of ptxas, and the contents of Triton's own
files. Of these only `libtriton.so` depends on the Python version. So the cache is filled here by
the wheel of this Python while the keys are computed with the library of that machine's wheel. Paths
are in the cache's group files alone; `unpack_cache` writes them anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

LIMIT = 64 << 20
ARCHIVE, FACTS = "triton_cache.tar.xz", "prepared.json"
# Of a cached kernel the runtime reads these; the rest is for people.
KEPT = (".json", ".cubin")
SOURCES = ("bench", "tests", "fastvlp", "csrc")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "results", "*.so", ".pytest_cache")
# The environment variable that names the libtriton.so of the keys, see dry_device.
KEY_LIBRARY = "FASTVLP_BENCH_LIBTRITON"
FILL_S = 4 * 3600.0


def add_flags(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("with --prepare")
    group.add_argument("--triton", default="3.6.0", help="version on that machine")
    group.add_argument("--target-python", default="3.12", help="of that machine")
    group.add_argument(
        "--fill-python", default=sys.executable, help="interpreter that fills the cache; has torch"
    )
    group.add_argument("--wheels", type=Path, help="folder of downloaded Triton wheels")


def prepare(args: argparse.Namespace, root: Path) -> int:
    """Put the folder together; returns 1 where it is larger than LIMIT."""
    folder = args.prepare.resolve()
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"--prepare: {folder} is not empty")
    copy_sources(root, folder)
    facts = {"commit": commit(root), "tests": collect(root)}
    (folder / FACTS).write_text(json.dumps(facts, indent=1))
    work = folder.with_name(folder.name + ".work")
    own, library = triton_wheels(args, work)
    cache = work / "cache"
    command = [args.fill_python, "bench/gpu_check.py", "--dry-run", "--workers", str(args.workers),
               "--seconds", str(FILL_S), "--cache", str(cache)]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(own), os.environ.get("PYTHONPATH", "")]),
        KEY_LIBRARY: str(library),
    }
    # Its summary says what could not be compiled; what was compiled is worth taking along.
    subprocess.run(command + ["--quick"] * args.quick, cwd=folder, env=environment, check=False)
    kernels = pack_cache(cache, folder / ARCHIVE)
    for leftover in (*folder.rglob("__pycache__"), *folder.glob(".hypothesis")):
        shutil.rmtree(leftover)
    print(f"{kernels} kernels in the cache")
    return report_size(folder)


def copy_sources(root: Path, folder: Path) -> None:
    """Sources and built libraries, laid out as an installed package has them."""
    for name in SOURCES:
        shutil.copytree(root / name, folder / name, ignore=LEFT_OUT)
    installed = folder / "fastvlp" / "kernels"  # in a checkout it may be a link
    shutil.rmtree(installed, ignore_errors=True)
    shutil.copytree(root / "kernels", installed, ignore=LEFT_OUT)
    shutil.copy2(root / "pyproject.toml", folder)
    for library in built_libraries():
        shutil.copy2(library, folder / "fastvlp")


def built_libraries() -> list[Path]:
    """The compiled libraries of the installed fastvlp and what its build recorded."""
    from fastvlp.ops import compiled

    reasons = compiled.load() or compiled.load_cuda()
    if reasons:
        raise SystemExit("--prepare needs both built libraries: " + "; ".join(reasons))
    home = Path(importlib.util.find_spec("fastvlp._C").origin).parent
    return [home / name for name in ("_C.so", "_C_cuda.so", "build_info.json")]


def collect(root: Path) -> list[str]:
    """The ids of the tests that run on the device, by the Python that has all that tests import."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "tests"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    tests = re.findall(r"^tests/\S+::.*$", found.stdout, re.MULTILINE)
    if found.returncode or not tests:
        raise SystemExit(f"collecting the tests failed:\n{found.stdout[-2000:]}{found.stderr}")
    return tests


def known_tests(root: Path) -> list[str]:
    """The ids that `prepare` collected; empty in a checkout."""
    path = root / FACTS
    return json.loads(path.read_text())["tests"] if path.exists() else []


def commit(root: Path) -> str | None:
    """The commit of a checkout, or that from which a folder was prepared."""
    path = root / FACTS
    if path.exists():
        return json.loads(path.read_text())["commit"]
    command = ("git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*")
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def triton_wheels(args: argparse.Namespace, work: Path) -> tuple[Path, Path]:
    """Triton for `--fill-python`, unpacked, and the libtriton.so for `--target-python`."""
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = subprocess.check_output([args.fill_python, "-c", ask], text=True).strip()
    own = _wheel(args, version, work)
    other = _wheel(args, args.target_python, work)
    unpacked, library = work / "triton", work / "libtriton.so"
    with zipfile.ZipFile(own) as archive:
        for member in archive.infolist():
            path = Path(archive.extract(member, unpacked))
            path.chmod((member.external_attr >> 16) & 0o777 or 0o644)
    with zipfile.ZipFile(own) as mine, zipfile.ZipFile(other) as theirs:
        for name in theirs.namelist():
            if name.endswith(".py") and mine.read(name) != theirs.read(name):
                raise SystemExit(f"{name} differs between the wheels: fill with that Python")
        library.write_bytes(theirs.read("triton/_C/libtriton.so"))
    return unpacked, library


def _wheel(args: argparse.Namespace, python: str, work: Path) -> Path:
    """The wheel of Triton for a version of Python, downloaded where `--wheels` lacks it."""
    tag = "cp" + python.replace(".", "")
    pattern = f"triton-{args.triton}-{tag}-{tag}-*x86_64.whl"
    for folder in filter(None, (args.wheels, work)):
        for found in folder.glob(pattern):
            return found
    subprocess.run(
        [args.fill_python, "-m", "pip", "download", f"triton=={args.triton}", "--no-deps",
         "--only-binary", ":all:", "--python-version", python, "--dest", str(work)],
        check=True,
    )  # fmt: skip
    return next(work.glob(pattern))


def pack_cache(cache: Path, archive: Path) -> int:
    """Write the kernels of a cache, without paths and without what only people read."""
    count = 0
    with tarfile.open(archive, "w:xz") as tar:
        for entry in sorted(path for path in cache.iterdir() if path.is_dir()):
            if not any(entry.glob("*.cubin")):
                continue
            count += 1
            for path in sorted(entry.iterdir()):
                if path.suffix in KEPT and path.is_file():
                    tar.add(path, f"{entry.name}/{path.name}", filter=_anonymous)
    return count


def kernels_in(cache: Path) -> int:
    """How many compiled kernels a cache holds."""
    return sum(1 for _ in cache.glob("*/*.cubin"))


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def unpack_cache(root: Path, cache: Path | None) -> Path:
    """Triton's cache folder here, filled from the archive where one came along."""
    cache = (cache or root / "build" / "triton").resolve()
    cache.mkdir(parents=True, exist_ok=True)
    archive = root / ARCHIVE
    if not archive.exists():
        return cache
    with tarfile.open(archive) as tar:
        tar.extractall(cache, filter="data")
    for group in cache.glob("*/__grp__*.json"):
        kept = [path for path in group.parent.iterdir() if path != group and path.suffix in KEPT]
        paths = {path.name: str(path) for path in kept if path.is_file()}
        group.write_text(json.dumps({"child_paths": paths}))
    return cache


def report_size(folder: Path) -> int:
    """Print what the folder holds; 1 where that is over LIMIT."""
    sizes: dict[str, int] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            top = path.relative_to(folder).parts[0]
            sizes[top] = sizes.get(top, 0) + path.stat().st_size
    total = sum(sizes.values())
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 2**20:8.2f} MiB  {name}")
    print(f"{total / 2**20:8.2f} MiB of {LIMIT >> 20} in {folder}")
    if total > LIMIT:
        print(f"too large by {(total - LIMIT) / 2**20:.2f} MiB", file=sys.stderr)
    return int(total > LIMIT)


def build_if_needed(root: Path, seconds: float) -> str:
    """Build csrc where the libraries that came along do not load; what was done, in words."""
    test = "from fastvlp.ops import compiled as c; print('; '.join(c.load() or c.load_cuda()))"
    environment = os.environ | {"PYTHONPATH": str(root)}

    def fault() -> str:
        command: Sequence[str] = (sys.executable, "-c", test)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
        return done.stdout.strip() or done.stderr.strip()[-300:]

    reasons = fault()
    if not reasons:
        return "the libraries load"
    if shutil.which("cmake") is None:
        return f"{reasons}; cmake, which would build them, is not there"
    build = root / "build" / "native"
    configure = ["cmake", "-S", str(root / "csrc"), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
                 f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip
    subprocess.run(configure, check=True, timeout=seconds, capture_output=True)
    jobs = str(os.cpu_count() or 1)
    compile_ = ["cmake", "--build", str(build), "-j", jobs]
    subprocess.run(compile_, check=True, timeout=seconds, capture_output=True)
    for library in build.rglob("_C*.so"):
        shutil.copy2(library, root / "fastvlp")
    return f"built here, since {reasons}; now: {fault() or 'the libraries load'}"
