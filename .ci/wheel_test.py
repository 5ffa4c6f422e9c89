"""What an installed wheel must do, from a folder that is not the checkout."""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

import fastvlp
from fastvlp import info, ops

print(info.report())
package = Path(fastvlp.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert (package / "py.typed").is_file()
assert not [name for name in ("bench", "csrc", "kernels", "tests") if find_spec(name)]
import fastvlp.kernels  # noqa: E402  # installed from kernels/

image, text = (torch.randn(300, 64) / 8 for _ in range(2))
for dtype in (torch.float32, torch.bfloat16):
    features = [x.to(dtype).detach().requires_grad_() for x in (image, text)]
    explanation = ops.explain("contrastive", *features)
    assert explanation.chosen == "native", explanation
    ops.contrastive(*features, 10.0).backward()
    exact = [x.detach().double().requires_grad_() for x in features]
    ops.contrastive_reference(*exact, 10.0).backward()
    for found, expected in zip(features, exact, strict=True):
        error = (found.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), error
print(f"fastvlp {fastvlp.__version__} works with torch {torch.__version__}")
