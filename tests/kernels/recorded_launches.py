"""The launches that the host code of the kernels would make on a GPU, recorded without one.

For child processes: it tells Triton of a GPU that is not there, and CPU tensors stand for its
memory. Nothing is compiled or run while launches are recorded; results are uninitialised.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from fastvlp.kernels import support
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

CAPABILITY = 90


class AbsentGpu:
    """As much of a Triton driver as comes before a launch."""

    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


class Properties:
    multi_processor_count = 132


@dataclass(frozen=True)
class Launch:
    """A kernel as the runtime has specialised it for its arguments."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    attributes: dict[tuple[int], list]
    options: dict[str, Any]

    def compile(self) -> Any:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(
            source, target=GPUTarget("cuda", CAPABILITY, 32), options=self.options
        )


def record(call) -> list[Launch]:
    """The launches of one call, each specialisation once."""
    found = {}

    def note(*, key, fn, compile, **_):
        options = {n: compile[n] for n in ("num_warps", "num_stages", "enable_fp_fusion")}
        own = compile["signature"], compile["constants"], compile["configs"][0], options
        found[key] = Launch(fn.jit_function, *own)
        return True  # stops here: nothing is compiled, and nothing launched

    driver.set_active(AbsentGpu())
    torch.cuda.get_device_capability = lambda device=None: divmod(CAPABILITY, 10)
    torch.cuda.get_device_properties = lambda device=None: Properties()
    support.device_reasons = lambda device: []
    triton.knobs.runtime.jit_cache_hook = note
    call()
    return list(found.values())
