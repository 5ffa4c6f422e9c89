"""What the published tool says of the layout: `check.py FOLDER`, with torch and kernels installed.

Run it from a folder that has no `kernels` in it: a checkout of fastvlp has one.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.dont_write_bytecode = True  # the files are compared with their digests

import torch  # noqa: E402
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata  # noqa: E402
from kernels.variants import (  # noqa: E402
    get_variants_local,
    parse_variant,
    resolve_variant,
)

from kernels import get_loaded_kernels, get_local_kernel  # noqa: E402

folder = Path(sys.argv[1]).resolve()
print(Build.open(folder).general)
variants = sorted(path for path in (folder / "build").iterdir())
for path in variants:
    metadata = Metadata.read_from_file(path / "metadata.json")
    backend = str(metadata.backend.backend_type)
    assert parse_variant(path.name).arch.backend_name == backend, (path.name, backend)
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, path))
    print(f"{path.name}: {metadata.id}, {len(metadata.digest.files)} files")

# The variant of this torch; nothing is fetched.
best, _ = resolve_variant(get_variants_local(folder / "build"))
kernel = get_local_kernel(folder)
(loaded,) = get_loaded_kernels()
assert best.variant_str == f"torch-{'cpu' if torch.version.cuda is None else 'cuda'}", best
assert loaded.metadata.id == kernel.__name__

torch.manual_seed(0)
features = [torch.randn(300, 64).div(8).requires_grad_() for _ in range(2)]
kernel.contrastive(*features, 10.0).backward()
exact = [x.detach().double().requires_grad_() for x in features]
logits = 10 * exact[0] @ exact[1].T
labels = torch.arange(300)
torch.nn.functional.cross_entropy(torch.cat([logits, logits.T]), labels.repeat(2)).backward()
for found, expected in zip(features, exact, strict=True):
    error = (found.grad.double() - expected.grad).norm() / expected.grad.norm()
    assert error < 1e-5, error
print(
    f"{kernel.__name__} is loaded from {best.variant_str} and works with torch {torch.__version__}"
)
