"""The instruction sets for which there are CPU kernels."""

import pytest
import torch


def force(monkeypatch, isa):
    """CPU kernels for `isa` in this test, which is skipped where the CPU lacks it."""
    usable = torch.ops.fastvlp.cpu_instruction_sets()
    if isa not in usable.split(","):
        pytest.skip(f"needs a CPU with {isa}; this one runs {usable.replace(',', ', ')}")
    monkeypatch.setenv("FASTVLP_CPU_ISA", isa)
