"""What the build makes of the compilers and the torch it finds, and what it says about that."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvlp import info, ops
from fastvlp.ops import compiled

CSRC = Path(__file__).parents[1] / "csrc"
CONTRASTIVE_PASSES = ("statistics", "gradient", "sigmoid")


def tool(name):
    """A build tool: beside this interpreter first, where pip puts them."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return shutil.which(name, path=path)


def folder_of_programs(folder, *without):
    """A folder for PATH with everything that is on PATH but the programs named."""
    folder.mkdir()
    for directory in filter(None, os.environ["PATH"].split(os.pathsep)):
        if not Path(directory).is_dir():
            continue
        for program in Path(directory).iterdir():
            link = folder / program.name
            if program.name not in without and not link.is_symlink():
                link.symlink_to(program)
    return folder


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


def configure(folder, path=None, *options, **environment):
    """Configures csrc (without building it); returns the build's facts and CMake's output."""
    done = run_cmake(folder, path, *options, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "build_info.json").read_text()), done.stdout


def run_cmake(folder, path=None, *options, **environment):
    variables = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_PATH")}
    variables |= {"PATH": str(path or os.environ["PATH"])} | environment
    return subprocess.run(
        [
            tool("cmake"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}", *options, "-S", CSRC, "-B", folder,
        ],
        env=variables, capture_output=True, text=True,
    )  # fmt: skip


def fake_torch(folder, cuda, version="2.10.0"):
    """A module named torch that a build sees in place of the real one."""
    (folder / "torch" / "include").mkdir(parents=True)
    (folder / "torch" / "lib").mkdir()
    text = f"class version:\n    cuda = {cuda!r}\n\n\n__version__ = {version!r}\n"
    (folder / "torch" / "__init__.py").write_text(text)
    return str(folder)


def broken_nvcc(folder):
    """A folder for PATH whose nvcc fails as one with an unsupported host compiler does."""
    programs = folder_of_programs(folder, "nvcc")
    text = '#!/bin/sh\necho "error: unsupported GNU version!" >&2\nexit 1\n'
    program(programs / "nvcc", text)
    return programs


def test_without_nvcc(tmp_path):
    programs = folder_of_programs(tmp_path / "programs", "nvcc")
    torch_here = fake_torch(tmp_path / "site", cuda="13.0")
    facts, output = configure(tmp_path / "build", programs, PYTHONPATH=torch_here)
    assert facts["cuda"] == "not built: nvcc was not found on PATH"
    assert facts["cuda_architectures"] == ""
    assert facts["torch"] == "2.10.0" and "portable" in facts["cpu"]
    assert "fastvlp: CUDA kernels: not built: nvcc was not found on PATH" in output
    assert "fastvlp_C_cuda" not in (tmp_path / "build" / "build.ninja").read_text()


def compilers():
    """Names of the C++ compilers on PATH."""
    folders = filter(None, os.environ["PATH"].split(os.pathsep))
    names = {path.name for folder in folders for path in Path(folder).glob("*+*")}
    return [name for name in names if re.fullmatch(r"(.*-)?(c|g|clang)\+\+(-\d+)?", name)]


def test_without_a_compiler_the_python_files_are_installed(tmp_path):
    programs = folder_of_programs(tmp_path / "programs", *compilers())
    facts, output = configure(tmp_path / "build", programs, CXX="")
    assert facts == {"unbuilt": "no C++ compiler was found"}
    assert "library" not in (tmp_path / "build" / "build.ninja").read_text().lower()
    facts, _ = configure(tmp_path / "build")  # one that was installed later
    assert "unbuilt" not in facts and "portable" in facts["cpu"]


def test_kernels_that_are_not_wanted_are_not_built(tmp_path):
    facts, _ = configure(tmp_path / "build", None, "-DFASTVLP_NATIVE=OFF")
    assert facts == {"unbuilt": "FASTVLP_NATIVE is off"}


def test_a_package_without_kernels_says_so_once(monkeypatch):
    monkeypatch.setattr(compiled, "_library", lambda name: None)
    monkeypatch.setattr(compiled, "build_info", lambda: {"unbuilt": "no C++ compiler was found"})
    monkeypatch.setattr(compiled, "_load", compiled._load.__wrapped__)
    reason = "the kernels were not compiled: no C++ compiler was found; install a C++20 compiler"
    assert info._build() == [f"{reason} and run `pip install -e .` again"]
    x = torch.randn(4, 8)
    with pytest.warns(RuntimeWarning, match="contrastive runs in plain PyTorch") as warned:
        found = [ops.contrastive(x, x, 1.0) for _ in range(2)]
    assert len(warned) == 1 and reason in str(warned[0].message)
    assert found[0] == ops.contrastive_reference(x, x, 1.0)


@pytest.mark.parametrize("version", ["2.9.1", "2.9.1+cu130"])
def test_an_old_torch_is_refused(tmp_path, version):
    site = fake_torch(tmp_path / "site", cuda=None, version=version)
    done = run_cmake(tmp_path / "build", PYTHONPATH=site)
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert f"expected torch 2.10 or newer, got {version}" in said
    assert "pip install --upgrade 'torch>=2.10'" in said


def test_a_missing_torch_is_asked_for(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    done = run_cmake(tmp_path / "build", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "pip install 'torch>=2.10'" in " ".join(done.stderr.split())


def test_with_an_nvcc_that_does_not_work(tmp_path):
    torch_here = fake_torch(tmp_path / "site", cuda="13.0")
    facts, _ = configure(
        tmp_path / "build", broken_nvcc(tmp_path / "programs"), PYTHONPATH=torch_here
    )
    assert facts["cuda"] == "not built: nvcc was found but cannot compile for 80-real;90"
    assert facts["cuda_architectures"] == ""


def test_with_a_cpu_build_of_torch(tmp_path):
    facts, output = configure(
        tmp_path / "build", PYTHONPATH=fake_torch(tmp_path / "site", cuda=None)
    )
    assert facts["cuda"] == "not built: this torch is a CPU build"
    assert facts["cuda_architectures"] == ""
    assert "Looking for a CUDA compiler" not in output


@pytest.mark.parametrize("watched", ["undefined", "address"])
def test_a_sanitizer_instruments_the_cpu_library(tmp_path, watched):
    torch_here = fake_torch(tmp_path / "site", cuda=None)
    facts, _ = configure(
        tmp_path / "build", None, f"-DFASTVLP_SANITIZE={watched}", PYTHONPATH=torch_here
    )
    assert facts["sanitizer"] == watched
    steps = (tmp_path / "build" / "build.ninja").read_text().split("\nbuild ")
    compiled = [step for step in steps if "cpu/ema/isa.cpp.o:" in step.splitlines()[0]]
    linked = [step for step in steps if step.startswith("_C.so")]
    assert compiled and linked
    assert all(f"-fsanitize={watched}" in step for step in compiled + linked)
    facts, _ = configure(tmp_path / "plain", PYTHONPATH=torch_here)
    assert facts["sanitizer"] == ""
    assert "-fsanitize" not in (tmp_path / "plain" / "build.ninja").read_text()


def test_an_unknown_sanitizer_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="FASTVLP_SANITIZE: expected undefined or address"):
        configure(tmp_path / "build", None, "-DFASTVLP_SANITIZE=thread")


def test_a_compiler_installed_later_is_found(tmp_path):
    torch_here = fake_torch(tmp_path / "site", cuda="13.0")
    programs = folder_of_programs(tmp_path / "programs", "nvcc")
    facts, _ = configure(tmp_path / "build", programs, PYTHONPATH=torch_here)
    assert facts["cuda"] == "not built: nvcc was not found on PATH"
    program(programs / "nvcc", "#!/bin/sh\nexit 1\n")
    facts, _ = configure(tmp_path / "build", programs, PYTHONPATH=torch_here)
    assert facts["cuda"].startswith("not built: nvcc was found but cannot compile")


def test_with_nvcc(tmp_path):
    torch_here = fake_torch(tmp_path / "site", cuda="13.0")
    facts, _ = configure(tmp_path / "build", PYTHONPATH=torch_here)
    if tool("nvcc") is None:
        assert facts["cuda"] == "not built: nvcc was not found on PATH"
        return
    assert re.fullmatch(r"built by nvcc \d+\.\d+ for 80-real;90", facts["cuda"])
    assert facts["cuda_architectures"] == "80-real;90"
    commands = (tmp_path / "build" / "build.ninja").read_text()
    for code in ("code=[sm_80]", "code=[compute_90,sm_90]"):
        assert code in commands
    chosen, _ = configure(
        tmp_path / "other", None, "-DCMAKE_CUDA_ARCHITECTURES=90", PYTHONPATH=torch_here
    )
    assert chosen["cuda_architectures"] == "90" and chosen["cuda"].endswith(" for 90")
    assert "sm_80" not in (tmp_path / "other" / "build.ninja").read_text()


# --- the installed libraries ---------------------------------------------------------------------


def library(name):
    found = compiled._library(name)
    assert found is not None, f"fastvlp/{name} is missing: install with `pip install -e .`"
    return found


def symbols(path, *flags):
    done = subprocess.run(["nm", "-D", *flags, path], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in done.stdout.splitlines()}


def cuda_library():
    """The CUDA library, or None where the build says that there is none."""
    if "not built" in compiled.build_info()["cuda"]:
        assert compiled._library("_C_cuda") is None
        return None
    return library("_C_cuda")


def test_only_the_stable_abi_is_used():
    for path in filter(None, (library("_C"), cuda_library())):
        needed = symbols(path, "--undefined-only")
        assert any(name.startswith("aoti_torch_") for name in needed)
        internals = [n for n in needed if re.match(r"_ZNK?(2at|3c10|5torch)", n)]
        assert not internals, f"{path.name} needs what only one version of torch has: {internals}"


def test_the_libraries_export_no_names_of_their_own():
    for path in filter(None, (library("_C"), cuda_library())):
        assert not [name for name in symbols(path, "--defined-only") if "fastvlp" in name]


def test_the_cuda_library_registers_its_operators():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    schemas = {name: getattr(torch.ops.fastvlp, f"contrastive_cuda_{name}").default._schema
               for name in CONTRASTIVE_PASSES}  # fmt: skip
    assert all(schema.is_mutable and not schema.returns for schema in schemas.values())
    built = cuda_library() is not None and torch.version.cuda is not None
    assert (compiled.load_cuda() == ()) == built
    for name in CONTRASTIVE_PASSES:
        assert has(f"fastvlp::contrastive_cuda_{name}", "CUDA") == built
    if built:
        assert "aoti_torch_get_current_cuda_stream" in symbols(cuda_library(), "--undefined-only")


def test_the_kernels_refuse_tensors_of_the_cpu():
    similarities, scale = torch.zeros(2, 3), torch.ones(())
    with pytest.raises(NotImplementedError, match="contrastive_cuda_statistics"):
        torch.ops.fastvlp.contrastive_cuda_statistics(
            similarities, scale, 0, torch.zeros(2), torch.zeros(2), torch.zeros(2, 3)
        )


def test_a_device_without_kernels_is_explained():
    if compiled.load_cuda():
        return
    reason = torch.ops.fastvlp.cuda_kernels_unavailable(torch.cuda.device_count())
    assert re.search("driver|device", reason), reason


def cuobjdump():
    beside = [shutil.which("cuobjdump"), *_packaged("triton", "backends/nvidia/bin/cuobjdump")]
    return next(filter(None, beside), None)


def _packaged(package, path):
    import importlib.util

    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else []
    return [str(Path(place) / path) for place in places if (Path(place) / path).exists()]


def test_machine_code_without_spills():
    architectures = compiled.build_info()["cuda_architectures"]
    dump, path = cuobjdump(), cuda_library()
    if path is None or dump is None:
        assert path is None or architectures
        return
    run = {"capture_output": True, "text": True, "check": True}
    found = subprocess.run([dump, "--list-elf", "--list-ptx", path], **run).stdout
    for entry in architectures.split(";"):
        number, _, kind = entry.partition("-")
        if number.isdigit() and kind != "virtual":
            assert f"sm_{number}.cubin" in found
        if number.isdigit() and kind != "real":
            assert f"sm_{number}.ptx" in found
    usage = subprocess.run([dump, "--dump-resource-usage", path], **run).stdout
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    for name in ("tile_statistics", "write_softmax_gradient", "sigmoid_tile", "finish_rows"):
        assert any(name in kernel for kernel, *_ in kernels)
    for name, registers, stack, local in kernels:
        # Two blocks of 256 threads on a multiprocessor's 65,536 registers, and no spills.
        assert int(registers) <= 128 and stack == local == "0", name


# --- the report ----------------------------------------------------------------------------------


def test_the_report(monkeypatch):
    facts = compiled.build_info()
    text = info.report()
    assert f"torch {torch.__version__}" in text
    assert f"built with {facts['compiler']} against torch {facts['torch']}" in text
    assert f"CUDA kernels: {facts['cuda']}" in text
    assert "contrastive: runs native" in text
    assert "  not triton: " in text and "  not reference: native is preferred" in text
    monkeypatch.setattr(compiled, "load_cuda", lambda: ("this torch is a CPU build",))
    monkeypatch.setattr(
        compiled, "build_info", lambda: facts | {"cuda": "built by nvcc 13.0 for 90"}
    )
    assert "CUDA library: this torch is a CPU build" in info.report()
    absent = "not built: nvcc was not found on PATH"
    monkeypatch.setattr(compiled, "build_info", lambda: facts | {"cuda": absent})
    assert f"CUDA kernels: {absent}" in info.report()
    assert "CUDA library:" not in info.report()
    monkeypatch.setattr(compiled, "build_info", dict)
    monkeypatch.setattr(compiled, "_load", lambda: ("the kernels were not compiled",))
    assert "\nthe kernels were not compiled\n" in info.report()


def test_an_instrumented_library_is_told(monkeypatch):
    facts = compiled.build_info()
    monkeypatch.setattr(compiled, "build_info", lambda: facts | {"sanitizer": "address"})
    assert "CPU kernels instrumented by the sanitizer of: address" in info.report()
    monkeypatch.setattr(compiled, "build_info", lambda: facts | {"sanitizer": ""})
    assert "sanitizer" not in info.report()


def test_the_module_prints_the_report():
    done = subprocess.run(
        [sys.executable, "-m", "fastvlp.info"], capture_output=True, text=True, check=True
    )
    assert f"CUDA kernels: {compiled.build_info()['cuda']}" in done.stdout


def test_a_library_built_from_older_sources_is_explained(monkeypatch):
    monkeypatch.setattr(compiled, "OPERATORS", ("matmul", "of_tomorrow"))
    (reason,) = compiled._load.__wrapped__()
    assert "older than its Python code and lacks of_tomorrow" in reason
    assert "pip install -e ." in reason
    assert not compiled.load()


def test_every_operator_of_the_schema_is_looked_for():
    """What a library lacks is named, before anything registers more for it."""
    schema = (CSRC / "schema.cpp").read_text()
    assert sorted(compiled.OPERATORS) == sorted(re.findall(r'm\.def\(\s*"(\w+)\(', schema))
