"""What a type checker sees of fastvlp: annotations on all public names, and their types in use."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PUBLIC = (
    "fastvlp", "fastvlp.data", "fastvlp.data.openmoji", "fastvlp.data.text", "fastvlp.evaluate",
    "fastvlp.evaluate.features", "fastvlp.evaluate.retrieval", "fastvlp.evaluate.zero_shot",
    "fastvlp.info", "fastvlp.integrations.open_clip", "fastvlp.losses", "fastvlp.masking",
    "fastvlp.models", "fastvlp.models.albef", "fastvlp.models.albef.tasks.classification",
    "fastvlp.models.albef.tasks.grounding", "fastvlp.models.albef.tasks.rerank",
    "fastvlp.models.albef.tasks.retrieval", "fastvlp.models.albef.tasks.vqa",
    "fastvlp.models.base", "fastvlp.models.checkpoints", "fastvlp.models.checkpoints.albef",
    "fastvlp.models.checkpoints.albef_heads", "fastvlp.models.clip", "fastvlp.models.vilt",
    "fastvlp.nn", "fastvlp.ops", "fastvlp.ops.packing", "fastvlp.optim",
)  # fmt: skip
# A user's file; each reveal_type is followed by what a type checker is to say of it.
USER = """
import torch
from torch import Tensor

import fastvlp
from fastvlp import EmaModel, FeatureQueue, GradCache, ops
from fastvlp.data import Loader
from fastvlp.evaluate.retrieval import retrieval
from fastvlp.integrations import open_clip
from fastvlp.losses import ClipLoss, SigLipLoss
from fastvlp.models import albef, clip, vilt
from fastvlp.nn import FusionLayer, attention, linear
from fastvlp.ops import contrastive, explain
from fastvlp.ops.packing import TextLayout
from fastvlp.optim import AdamWEma

x = torch.zeros(4, 8)
model = clip.create("ViT-B/16")
ema = EmaModel(model, decay=0.999, copy_dtype=torch.bfloat16)
layer: FusionLayer
loader: Loader
reveal_type(contrastive(x, x, 1.0))  # torch._tensor.Tensor
reveal_type(ops.sigmoid_contrastive(x, x, 1.0, 0.0))  # torch._tensor.Tensor
reveal_type(ops.matmul(x, x))  # torch._tensor.Tensor
reveal_type(ops.momentum_contrastive)  # def (
reveal_type(explain("contrastive").chosen)  # str | None
reveal_type(fastvlp.ops.contrastive(x, x, 1.0))  # torch._tensor.Tensor
reveal_type(fastvlp.models.save)  # def (
reveal_type(fastvlp.create("tiny").preprocess)  # fastvlp.data.images.preprocess.Preprocess
reveal_type(ClipLoss(local_loss=True, rank=0, world_size=2))  # fastvlp.losses.ClipLoss
reveal_type(FeatureQueue(16, 8).size)  # int
reveal_type(ema.model)  # torch.nn.modules.module.Module
reveal_type(AdamWEma(model.parameters(), lr=1e-3, ema=ema))  # fastvlp.optim.AdamWEma
reveal_type(model)  # fastvlp.models.clip.model.Clip
reveal_type(albef.create)  # def (name: str, **overrides: Any) -> fastvlp.models.albef.model.Albef
reveal_type(vilt.create)  # def (name: str, **overrides: Any) -> fastvlp.models.vilt.model.Vilt
reveal_type(TextLayout.from_lengths([3, 2], 4))  # fastvlp.ops.packing.layouts.TextLayout
reveal_type(open_clip.patch())  # list[str]
reveal_type(linear(x, x))  # torch._tensor.Tensor
contrastive(x, "text", 1.0)  # error: Argument 2 to "contrastive" has incompatible type "str"
ClipLoss(local_los=True)  # error: Unexpected keyword argument "local_los" for "ClipLoss"
"""


def public_functions():
    """(dotted name, function) of every public function and method of fastvlp's own."""
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module_name]
        for name in getattr(module, "__all__", own):
            value = getattr(module, name)
            if name.startswith("_") or not getattr(value, "__module__", "").startswith("fastvlp"):
                continue
            if inspect.isfunction(value):
                yield f"{module_name}.{name}", value
            elif inspect.isclass(value):
                for method, member in vars(value).items():
                    function = getattr(member, "__func__", getattr(member, "fget", member))
                    public = not method.startswith("_") or method in ("__init__", "__call__")
                    if public and inspect.isfunction(function):
                        yield f"{module_name}.{name}.{method}", function


def unannotated(name: str, function) -> list[str]:
    """Parameters of a function without an annotation, and "return" where that has none."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if name.split(".")[-2][:1].isupper() and parameters[:1]:
        parameters = [p for p in parameters if p.name not in ("self", "cls")]
    missing = [p.name for p in parameters if p.annotation is inspect.Parameter.empty]
    constructs = name.endswith(".__init__")
    if signature.return_annotation is inspect.Signature.empty and not constructs:
        missing.append("return")
    return missing


def test_every_public_function_is_annotated():
    functions = dict(public_functions())
    assert len(functions) > 200
    missing = {name: unannotated(name, function) for name, function in functions.items()}
    assert {name: found for name, found in missing.items() if found} == {}


def test_a_missing_annotation_is_noticed():
    def function(self, x, *, y: int):
        pass

    assert unannotated("fastvlp.ops.function", function) == ["self", "x", "return"]
    assert unannotated("fastvlp.nn.Layer.function", function) == ["x", "return"]


def test_the_package_says_that_it_has_types():
    assert (ROOT / "fastvlp" / "py.typed").is_file()


def test_a_user_sees_types(tmp_path):
    """mypy on a user's file and on the bodies of the modules that pyproject.toml lists."""
    (tmp_path / "user.py").write_text(USER)
    listed = re.search(r"^files = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    files = re.findall(r'"(.+?)"', listed[1])
    done = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir",
            tmp_path / "cache", "--hide-error-context", "--no-error-summary",
            tmp_path / "user.py", *files,
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if "No module named mypy" in done.stderr:
        pytest.fail("mypy is not installed; run: pip install -e '.[test]'")
    said: dict[int, str] = {}
    others = []
    for line in done.stdout.splitlines():
        if found := re.match(r".*user\.py:(\d+): (.*)", line):
            number, message = int(found[1]), found[2]
            said[number] = said.get(number, "") + message.replace("Revealed type is ", "")
        else:
            others.append(line)
    assert others == [] and done.stderr == ""
    for number, line in enumerate(USER.splitlines(), start=1):
        _, expects, expected = line.partition("  # ")
        assert bool(expects) == (number in said), f"{line}: {said.get(number)}"
        assert expected in said.get(number, ""), f"{line}: {said[number]}"
