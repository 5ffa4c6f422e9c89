"""Devices and streams of the operators of csrc/cuda: what they leave behind, and for whom tables of
tensors are copied to the device."""

import pytest
import torch


@pytest.fixture
def state(library):
    yield library.state
    for name, value in (("stream", 0), ("capturing", 0), ("events_reached", 1)):
        setattr(library.state, name, value)


def calls():
    x, vector, scale = torch.randn(3, 8), torch.zeros(3), torch.tensor(2.0)
    columns, pairs = torch.zeros(8), torch.zeros(2, 8)
    sums = torch.zeros(2, dtype=torch.float64)
    lists = [[torch.ones(5)] for _ in range(4)]
    factors = 1e-3, 0.9, 0.99, 1e-8, 0.1, 1.0, False, None, 0.5, None
    return {
        "contrastive_cuda_statistics": (x, scale, 0, vector.double(), vector, pairs),
        "contrastive_cuda_gradient": (
            x,
            scale,
            vector.double(),
            columns.double(),
            vector,
            torch.ones(2),
            0,
            x,
        ),
        "contrastive_cuda_sigmoid": (x, scale, scale, 0.5, 0, sums, torch.empty(0)),
        "cuda_kernels_unavailable": (0,),
        "ema_update": ([torch.zeros(5)], [torch.ones(5)], [], None, 0.5, None),
        "adamw_ema": (*lists, [], [], [], *factors),
        "last_exceeding": ([torch.zeros(5)], 1.0),
    }


@pytest.mark.parametrize("name", calls())
def test_every_operator_leaves_the_device_that_was_current(library, state, name):
    # Tensors of device 0 (-1 for the CPU's that stand for them) in a thread that works on device 1.
    state.torch_device = state.driver_device = 1
    during = []
    library.call(name, calls()[name], lambda launch: during.append(state.driver_device))
    assert all(device != 1 for device in during)
    assert (state.torch_device, state.driver_device) == (1, 1)


def test_a_device_that_is_not_there_is_named_and_left_alone(library, state):
    state.torch_device = state.driver_device = 1
    found = library.call("cuda_kernels_unavailable", (2,), lambda launch: None)
    assert found == "unknown error"  # of the stand-in for cudaErrorInvalidDevice
    assert (state.torch_device, state.driver_device) == (1, 1)


@pytest.fixture
def update(library, state):
    """update(tensors, stream): how many copies to the device an update on this stream makes."""

    def call(tensors, stream, capturing=False):
        state.stream, state.capturing = stream, capturing
        copies = []
        library.call(
            "ema_update", (tensors, sources, [], None, 0.5, None), lambda launch: None,
            lambda tensor, written: written and copies.append(tensor),
        )  # fmt: skip
        return len(copies)

    sources = [torch.ones(7)]
    return call


def test_every_stream_has_a_table_of_its_own(update):
    # The upload of another stream may not have arrived, and its memory may be given away.
    tensors = [torch.zeros(7)]
    assert [update(tensors, stream) for stream in (1, 2, 1, 2, 3)] == [1, 1, 0, 0, 1]


def test_a_capture_reads_a_table_that_has_arrived(update, state):
    tensors = [torch.zeros(7)]
    message = "momentum: expected one call with the same tensors, and a wait for the device"
    with pytest.raises(RuntimeError, match=message):
        update(tensors, 4, capturing=True)
    assert update(tensors, 1) == 1
    state.events_reached = 0
    with pytest.raises(RuntimeError, match=message):
        update(tensors, 4, capturing=True)
    state.events_reached = 1
    assert update(tensors, 4, capturing=True) == 0
