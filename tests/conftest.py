"""Shared test settings: the device, poisoned memory, and the error measure of the whole suite."""

import pytest
import torch
from hypothesis import HealthCheck, settings

# Timings on a shared machine must not fail a property test; the examples are the same every run.
settings.register_profile(
    "fastvlp",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fastvlp")


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", choices=["cpu", "cuda"], help="where the operators are tested"
    )


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """The device of the operator tests."""
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    return torch.device(name)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty gives NaN, so that an element no kernel wrote fails its test."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
