"""The layout for the Hugging Face kernels hub: complete, apart from fastvlp, and as accurate."""

import ast
import base64
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastvlp_tests.tolerance import assert_as_accurate
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvlp import ops
from fastvlp.ops import compiled
from fastvlp.ops._core.implement import IMPLEMENTED

ROOT = Path(__file__).parents[1]
# What the hub lets a kernel import, and packages that attention uses where they are.
ALLOWED = {*sys.stdlib_module_names, "torch", "triton", "flash_attn", "xformers"}


def load(path, name):
    """A package in a folder under a name of its own, as the hub's tool loads it."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


layout = load(ROOT / ".ci" / "hub" / "layout.py", "hub_layout")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "layout"
    assert [path.name for path in layout.write(folder)] == ["torch-cpu", "torch-cuda"]
    return folder


def metadata(variant):
    return json.loads((variant / "metadata.json").read_text())


@pytest.fixture(scope="module", params=["torch-cpu", "torch-cuda"])
def variant(request, hub):
    return hub / "build" / request.param


@pytest.fixture(scope="module")
def loaded(variant):
    name = metadata(variant)["id"]
    return sys.modules.get(name) or load(variant / "__init__.py", name)


def test_the_build_is_described_as_the_project_is(hub):
    project = (ROOT / "pyproject.toml").read_text()
    wanted = [re.search(rf'^{key} = ".+"$', project, re.M)[0] for key in ("name", "license")]
    wanted += ["version = 0", "edition = 5", 'backends = ["cpu", "cuda"]']
    sections = (hub / "build.toml").read_text().split("\n\n")
    assert sections[0].split("\n")[0] == "[general]"
    assert sorted(sections[0].split("\n")[1:]) == sorted(wanted)
    assert sections[1:] == ["[torch-noarch]\n"]


def test_metadata_names_every_file_with_its_digest(variant):
    described = metadata(variant)
    assert described["backend"] == {"type": variant.name.removeprefix("torch-")}
    found = {
        path.relative_to(variant).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in variant.rglob("*")
        if path.is_file() and path.name != "metadata.json" and "__pycache__" not in path.parts
    }
    assert described["digest"] == {"algorithm": "sha256", "files": found}
    assert {"ops/contrastive/api.py", "kernels/contrastive/forward.py", "losses.py"} <= set(found)


def test_all_imports_of_its_own_are_relative(variant):
    for path in variant.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {each.name.split(".")[0] for each in node.names} <= ALLOWED, path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in ALLOWED, path


def run_with_kernel(variant, code, **environment):
    """Runs code in a process of its own, with the variant loaded as `kernel`."""
    name = metadata(variant)["id"]
    prelude = f"""
import importlib.util, pkgutil, sys
sys.dont_write_bytecode = True
spec = importlib.util.spec_from_file_location("{name}", "{variant}/__init__.py")
sys.modules["{name}"] = kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
"""
    command = [sys.executable, "-c", prelude + code]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_module_imports_without_fastvlp(hub):
    code = """
sys.modules["fastvlp"] = None  # an import of it is an error
for each in pkgutil.walk_packages(kernel.__path__, f"{kernel.__name__}."):
    if not each.name.endswith("__main__"):
        importlib.import_module(each.name)
assert sys.modules[f"{kernel.__name__}.kernels._core.aot"].all_cases()
"""
    run_with_kernel(hub / "build" / "torch-cuda", code)


def test_operators_are_those_of_fastvlp_in_another_namespace(loaded):
    mine = getattr(torch.ops, loaded.__name__)
    for name in compiled.OPERATORS:
        schema = str(getattr(mine, name).default._schema)
        assert schema.replace(f"{loaded.__name__}::", "fastvlp::") == str(
            getattr(torch.ops.fastvlp, name).default._schema
        )
    implemented = sys.modules[f"{loaded.__name__}.ops._core.implement"].IMPLEMENTED
    assert implemented == IMPLEMENTED and implemented is not IMPLEMENTED
    for name in IMPLEMENTED["CUDA"]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{loaded.__name__}::{name}", "CUDA")
    assert set(loaded.operators()) == set(ops.operators())


def test_triton_runs_on_cuda_devices(loaded, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with FakeTensorMode():
        x, y = torch.empty(2, 64, 32, device="cuda", dtype=torch.bfloat16)
        for op in ("contrastive", "sigmoid_contrastive", "soft_cross_entropy"):
            explanation = loaded.explain(op, x, y)
            assert explanation.chosen == "triton", explanation


def contrastive(package, features):
    features = [x.detach().requires_grad_() for x in features]
    loss = package.contrastive(*features, 10.0)
    return [loss.detach(), *torch.autograd.grad(loss, features)]


@pytest.mark.filterwarnings("ignore:contrastive runs in plain PyTorch")
def test_results_are_as_accurate_as_those_of_fastvlp(loaded):
    features = [x / 8 for x in torch.randn(2, 70, 64, generator=torch.Generator().manual_seed(0))]
    assert loaded.explain("contrastive", *features).chosen == "reference"
    ours, installed, exact = (
        contrastive(*each)
        for each in ((loaded, features), (ops, features), (ops, [x.double() for x in features]))
    )
    for name, *results in zip(("loss", "dx", "dy"), ours, installed, exact, strict=True):
        assert_as_accurate(name, *results)


@pytest.mark.filterwarnings("ignore:contrastive runs in plain PyTorch")
def test_two_versions_live_in_one_process(hub, loaded, monkeypatch, tmp_path):
    sources = layout.collect()
    sources["losses.py"] += "\n# of a later version\n"
    monkeypatch.setattr(layout, "collect", lambda: sources)
    later, *_ = layout.write(tmp_path / "later")
    name = metadata(later)["id"]
    assert name.startswith("_fastvlp_cpu_") and name != metadata(hub / "build" / "torch-cpu")["id"]
    other = load(later / "__init__.py", name)
    features = torch.randn(2, 9, 8)
    for mine, others in zip(
        contrastive(loaded, features), contrastive(other, features), strict=True
    ):
        assert torch.equal(mine, others)
    assert loaded.contrastive is not other.contrastive


def test_older_tools_find_the_same_in_a_folder_of_the_kernels_name(variant, loaded):
    same = load(variant / "fastvlp" / "__init__.py", f"{loaded.__name__}_folder")
    assert same.__all__ == loaded.__all__
    assert all(getattr(same, name) is getattr(loaded, name) for name in same.__all__)


def test_triton_kernels_give_the_bits_of_fastvlps(hub):
    code = """
import torch
from fastvlp.kernels.contrastive import contrastive_statistics
mine = importlib.import_module(f"{kernel.__name__}.kernels.contrastive").contrastive_statistics
assert mine is not contrastive_statistics
x, y, scale = torch.randn(40, 24), torch.randn(40, 24), torch.tensor(2.0)
for a, b in zip(mine(x, y, scale), contrastive_statistics(x, y, scale), strict=True):
    assert a.isfinite().all() and torch.equal(a, b)
"""
    run_with_kernel(hub / "build" / "torch-cuda", code, TRITON_INTERPRET="1")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="folder: expected a new one, or one that this script"):
        layout.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
