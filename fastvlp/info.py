"""`python -m fastvlp.info`: versions, devices, what was compiled, and which backends run."""

import os
import platform
import sys

import torch

import fastvlp
from fastvlp.ops import compiled, explain, operators


def report() -> str:
    """The whole report as text."""
    return "\n".join([*_versions(), "", *_build(), "", *_backends()])


def _versions() -> list[str]:
    lines = [
        f"fastvlp {fastvlp.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        f"CPU: {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} torch threads",
    ]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        lines.append(f"cuda:{index}: {name}, compute capability {major}.{minor}")
    if torch.cuda.device_count() == 0:
        lines.append("no CUDA device")
    return lines


def _build() -> list[str]:
    facts = compiled.build_info()
    if "compiler" not in facts:
        return list(compiled.load())
    lines = [f"built with {facts['compiler']} against torch {facts['torch']}"]
    lines += [f"native library does not load: {reason}" for reason in compiled.load()]
    lines.append(f"CPU kernels compiled for: {facts['cpu'].replace(';', ', ')}")
    if watched := facts.get("sanitizer"):
        lines.append(f"CPU kernels instrumented by the sanitizer of: {watched}; they are slow")
    if not compiled.load():
        usable = compiled.instruction_sets()
        fault = compiled.instruction_set_fault()
        forced = os.environ.get("FASTVLP_CPU_ISA")
        used = "none, see below" if fault else forced or usable[0]
        lines.append(f"this CPU runs: {', '.join(usable)}; in use: {used}")
        lines += [fault] if fault else []
    lines.append(f"CUDA kernels: {facts['cuda']}")
    if "not built" not in facts["cuda"]:
        why = compiled.load_cuda()
        lines.append(f"CUDA library: {'; '.join(why) if why else 'loaded'}")
    return lines


def _backends() -> list[str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [f"backends for float32 tensors on {device}:"] + [_backend(op) for op in operators()]


def _backend(op: str) -> str:
    try:
        return str(explain(op))
    except ValueError as error:  # an impossible setting, which this report is to show
        return f"{op}: runs nowhere\n  {error}"


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
