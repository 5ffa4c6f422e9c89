"""Shared test settings: the device, threads, poisoned memory, logging, draws of random inputs."""

import gc
import inspect
import logging
import os
from contextlib import ExitStack

import pytest
import torch
from fastvlp_tests import kernel_counts as counts
from fastvlp_tests import seeds, tolerance
from hypothesis import HealthCheck, settings

# Timings on a shared machine must not fail a property test; the examples are the same every run.
settings.register_profile(
    "fastvlp",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fastvlp")


# Fixtures that take a test to the device of --device.
ON_DEVICE = {"device", "run_kernel", "run_kernel_with"}


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", choices=["cpu", "cuda"], help="where the operators are tested"
    )
    parser.addoption(
        "--seed-offset",
        type=int,
        default=0,
        metavar="N",
        help="added to all seeds of random inputs, to run numeric tests on other draws",
    )


def pytest_configure(config):
    # Before test modules are imported, some of which draw at once.
    stack = ExitStack()
    stack.enter_context(seeds.shifted(config.getoption("--seed-offset")))
    config.add_cleanup(stack.close)
    # pytest-xdist: the processes share the cores, and so do those that their tests start.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    if config.getoption("--device") == "cuda":
        # cuBLAS needs it for the deterministic algorithms that `poisoned_memory` asks for.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`pytest -n 2`: the tests of a file stay together, so that its fixtures are made once."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """The garbage collector rests meanwhile, and then passes over all that was made: modules and
    tests, which stay to the end, are most of what it would go through again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_itemcollected(item):
    """The marker `gpu` for tests that run on the device of --device."""
    if not ON_DEVICE.isdisjoint(item.fixturenames):
        item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A draw that misses the error measure is judged together with others, see tolerance.py."""
    try:
        return (yield)
    except tolerance.TooInaccurate as first:
        names = inspect.signature(pyfuncitem.obj).parameters
        given = pyfuncitem.funcargs
        arguments = {name: given[name] for name in names if name in given}
        tolerance.judge_over_draws(lambda: pyfuncitem.obj(**arguments), first)
        return True


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """The device of the operator tests."""
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    return torch.device(name)


@pytest.fixture
def kernel_counts(request) -> counts.Recorder:
    """Where a test says which kernels it interpreted, executed or compiled."""
    return counts.Recorder(request.node.user_properties)


def pytest_terminal_summary(terminalreporter):
    line = counts.summary(terminalreporter.getreports("passed"))
    if line:
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty gives NaN, so that an element no kernel wrote fails its test."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def kept_threads():
    """The number of threads that a test sets, as benchmarks do, ends with it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def kept_logging():
    """Levels and handlers that a test sets, as scripts with logs do, end with it."""
    root, known = logging.root, logging.root.manager.loggerDict
    # A name that only has loggers below it, and no logger yet, has no level of its own.
    levels = {name: getattr(each, "level", logging.NOTSET) for name, each in known.items()}
    root_level, handlers = root.level, set(root.handlers)
    yield
    root.setLevel(root_level)
    for name, level in levels.items():
        logger = known[name]
        # To set a level empties the caches of all loggers.
        if isinstance(logger, logging.Logger) and logger.level != level:
            logger.setLevel(level)
    for handler in set(root.handlers) - handlers:
        root.removeHandler(handler)
        handler.close()
