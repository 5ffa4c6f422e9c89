"""Wheels of torch and Triton, fetched for what is inside them and never installed."""

import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

# Torch's headers are the same in all its wheels; those for macOS are the smallest.
SMALLEST = ("--platform", "macosx_14_0_arm64", "--platform", "macosx_11_0_arm64")


@dataclass(frozen=True)
class Wheel:
    """A wheel of one version, and where its files lie once `unpack` has run."""

    path: Path

    @property
    def version(self) -> str:
        return self.path.name.split("-")[1]

    def unpack(self, *folders: str) -> Path:
        """Unpacks the members below `folders` (all, without any) next to the wheel, once."""
        target = self.path.with_suffix("")
        if not (done := target / "unpacked").exists():
            with zipfile.ZipFile(self.path) as archive:
                names = [n for n in archive.namelist() if not folders or n.startswith(folders)]
                archive.extractall(target, names)
                for name in names:  # programs, which zipfile extracts without their mode
                    mode = archive.getinfo(name).external_attr >> 16
                    if mode & 0o111:
                        (target / name).chmod(0o755)
            done.touch()
        return target


def fetch(requirement: str, folder: Path, *options: str) -> Wheel:
    """Downloads the wheel that pip chooses for a requirement, unless it lies in the folder.

    Says what it fetched or kept. Raises RuntimeError with pip's message where there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob("*.whl"))
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir",
            "--only-binary=:all:", *options, "--dest", folder, requirement,
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"pip has no wheel for {requirement}:\n{done.stderr}")
    name = re.findall(r"([\w.+-]+\.whl)", done.stdout)[-1]
    path = folder / name
    verb = "kept" if path in before else "fetched"
    print(f"{verb:<8} {name}, {path.stat().st_size / 2**20:.0f} MiB", flush=True)
    return Wheel(path)
