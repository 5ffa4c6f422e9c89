"""The settings at which a Triton kernel is compiled, to compare those executed with a table's."""

from __future__ import annotations

from dataclasses import dataclass, replace

_DTYPES = ("bf16", "fp16")
_TILE = ("BLOCK", "WIDTH", "REST", "HALVES")


@dataclass(frozen=True, order=True)
class Setting:
    """A kernel's dtype (the narrowest of its pointers), tile, switches and warps.

    The tile holds the constants named BLOCK..., WIDTH, REST and HALVES, the switches those that are
    booleans.
    """

    capability: int
    kernel: str
    dtype: str
    tile: tuple[tuple[str, int], ...]
    switches: tuple[tuple[str, bool], ...]
    warps: int

    def __str__(self) -> str:
        tile = " ".join(f"{name}={size}" for name, size in self.tile)
        on = " ".join(name for name, value in self.switches if value)
        return f"sm_{self.capability} {self.kernel} {self.dtype} {tile} {on} warps={self.warps}"

    def in_dtype(self, dtype: str) -> Setting:
        return replace(self, dtype=dtype)


def of_case(case) -> Setting:
    """Of an ahead-of-time case (`fastvlp.kernels._core.aot.Case`)."""
    return _setting(
        case.capability, case.kernel.__name__, case.signature.values(), case.constants, case.warps
    )


def of_launch(capability: int, launch) -> Setting:
    """Of a launch on a virtual GPU (`ptx_machine.virtual_gpu.Launch`)."""
    source = launch.compiled.src
    names = source.fn.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    kinds = [kind for kind in source.signature.values() if kind != "constexpr"]
    return _setting(capability, launch.kernel, kinds, constants, launch.compiled.metadata.num_warps)


def _setting(capability: int, kernel: str, kinds, constants: dict, warps: int) -> Setting:
    pointers = {kind.removeprefix("*") for kind in kinds if kind.startswith("*")}
    return Setting(
        capability=capability,
        kernel=kernel,
        dtype=next((dtype for dtype in _DTYPES if dtype in pointers), "fp32"),
        tile=tuple(sorted((k, v) for k, v in constants.items() if k.startswith(_TILE))),
        switches=tuple(sorted((k, v) for k, v in constants.items() if isinstance(v, bool))),
        warps=warps,
    )
