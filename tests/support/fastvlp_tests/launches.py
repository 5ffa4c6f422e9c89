"""Launches through fastvlp.kernels._core.launch, for child processes in which Triton compiles."""

import torch


def _kernel(name="scale_kernel"):
    from ptx_machine import planted_launchers

    return getattr(planted_launchers, name)


def _launch(kernel, x, out, count, factor=3.0, block=128, warps=4):
    from fastvlp.kernels._core.launch import launch

    programs = -(-count // block) if count < 1 << 20 else 0
    launch(
        kernel, max(1, programs), {"x_ptr": x, "out_ptr": out},
        {"count": count, "factor": factor}, {"BLOCK": block}, {"num_warps": warps},
    )  # fmt: skip


def scaled(name: str, launches: list[tuple[int, float]]) -> tuple[bool, list[bool]]:
    """Whether launches of (count, factor) with other tensors each give what they should, and which
    were compiled."""
    from fastvlp.kernels._core import launch
    from ptx_machine.virtual_gpu import VirtualGPU

    launch._COMPILED.clear()
    right, compiled = True, []
    with VirtualGPU(90):
        for count, factor in launches:
            known = len(launch._COMPILED)
            x = torch.randn(count)
            out = torch.zeros(count)
            _launch(_kernel(name), x, out, count, factor)
            right &= torch.equal(out, x * factor)
            compiled.append(len(launch._COMPILED) > known)
    return right, compiled


def kernels_of_a_change(change: str) -> tuple[str, str]:
    """The hashes of the compiled kernels of two launches, where one thing is another."""
    from ptx_machine.virtual_gpu import VirtualGPU

    x = torch.zeros(400)
    usual = {"x": x, "out": x, "count": 300}
    half = x.bfloat16()
    other = {
        "dtype": {"x": half, "out": half},
        "alignment": {"x": x[1:]},
        "constant": {"block": 256},
        "option": {"warps": 2},
        "wide integer": {"count": 1 << 32},
        "number": {"count": 16, "factor": 1.0},
    }
    found = []
    for capability, changes in ((90, {}), (80 if change == "device" else 90, other.get(change))):
        with VirtualGPU(capability, execute=False) as gpu:
            _launch(_kernel(), **usual | (changes or {}))
        (launched,) = gpu.launches
        found.append(launched.compiled.hash)
    return tuple(found)


def refused(change: str) -> None:
    """A first launch of its kind with arguments that are not the kernel's."""
    from fastvlp.kernels._core import launch as launches
    from ptx_machine.virtual_gpu import VirtualGPU

    launches._COMPILED.clear()
    x = torch.zeros(300)
    tensors, numbers = {"x_ptr": x, "out_ptr": x}, {"count": 300, "factor": 2.0}
    if change == "order":
        numbers = dict(reversed(numbers.items()))
    if change == "missing":
        del numbers["factor"]
    with VirtualGPU(90, execute=False):
        launches.launch(_kernel(), 3, tensors, numbers, {"BLOCK": 128}, {"num_warps": 4})
