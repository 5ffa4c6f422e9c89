"""GradCache against the step on the whole batch at once."""

import copy

import pytest
import torch
from fastvlp_tests.tolerance import assert_as_accurate, epsilon
from fastvlp_tests.two_towers import (
    WIDTH,
    Towers,
    assert_equal_to_rounding,
    batch,
    contrastive,
    gradients,
    plain_step,
    rounding,
    towers,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastvlp import GradCache
from fastvlp.losses import ClipLoss, SigLipLoss


def same_gradients(model, other):
    return all(torch.equal(a, b) for a, b in zip(gradients(model).values(), other, strict=True))


class Recorder(nn.Module):
    """Keeps what its model returns, one entry for each call."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.calls = []

    def forward(self, *inputs):
        outputs = self.model(*inputs)
        self.calls.append([output.detach().clone() for output in outputs])
        return outputs


@settings(max_examples=50)
@given(
    rows=st.integers(2, 17),
    chunk_size=st.integers(1, 20),
    width=st.integers(2, 9),
    seed=st.integers(0, 99),
)
def test_gradients_are_those_of_the_whole_batch(rows, chunk_size, width, seed):
    # In float32 against float64, because rounding grows where a random feature is nearly zero.
    model = towers(seed, width=width, dtype=torch.float32)
    inputs = batch(rows, seed, torch.float32, width)
    plain = plain_step(model, contrastive, *inputs)
    exact = plain_step(copy.deepcopy(model).double(), contrastive, *(t.double() for t in inputs))
    loss = GradCache(model, contrastive, chunk_size).step(*inputs)
    assert not loss.requires_grad
    ours, eager, wanted = (
        {"loss": loss, **gradients} for loss, gradients in ((loss, gradients(model)), plain, exact)
    )
    for name, value in wanted.items():
        floor = rounding(name, value, rows, width, torch.float32)
        assert_as_accurate(name, ours[name], eager[name], value, floor)


@pytest.mark.parametrize("loss", [ClipLoss(), SigLipLoss()], ids=["clip", "siglip"])
@pytest.mark.parametrize("chunk_size", [1, 7, 24, 100])
def test_float32_is_as_accurate_as_the_plain_step(loss, chunk_size, device):
    model = towers(dtype=torch.float32).to(device)
    inputs = [x.to(device) for x in batch(24, 1, torch.float32)]
    eager_loss, eager = plain_step(model, loss, *inputs)
    exact_loss, exact = plain_step(
        copy.deepcopy(model).double(), loss, *[x.double() for x in inputs]
    )
    ours = GradCache(model, loss, chunk_size).step(*inputs)
    ulp = epsilon(torch.float32)
    assert_as_accurate("loss", ours, eager_loss, exact_loss, ulp * exact_loss.item())
    for name, gradient in gradients(model).items():
        floor = ulp * exact[name].norm().item()
        assert_as_accurate(name, gradient, eager[name], exact[name], floor)


def test_a_batch_without_rows_is_one_chunk():
    def loss(x, y, scale):
        return scale * (x * y).sum()

    model = Recorder(towers())
    value = GradCache(model, loss, 4).step(*batch(0, 0))
    assert value.item() == 0
    assert len(model.calls) == 2
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_existing_gradients_stay_and_gain_the_new_ones():
    model = towers()
    first, second = batch(7, 1), batch(9, 2)
    _, a = plain_step(model, contrastive, *first)
    _, b = plain_step(model, contrastive, *second)
    cache = GradCache(model, contrastive, 4)
    cache.step(*first)
    cache.step(*second)
    assert_equal_to_rounding(gradients(model), {name: a[name] + b[name] for name in a}, 16)


def test_replayed_chunks_draw_the_masks_of_the_first_pass(device):
    model = Recorder(towers(dropout=0.5).to(device))
    GradCache(model, contrastive, 4).step(*[x.to(device) for x in batch(10, 0)])
    first, replayed = model.calls[:3], model.calls[3:]
    for before, after in zip(first, replayed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(first[0][0], model.model(*[x.to(device) for x in batch(4, 0)])[0])


def test_dropout_equals_the_chunks_with_all_graphs_alive(device):
    """Also the random state afterwards is that of one pass over the chunks."""
    model = towers(dropout=0.5).to(device)
    inputs = [x.to(device) for x in batch(10, 0)]
    reference = copy.deepcopy(model)
    torch.manual_seed(3)
    parts = [reference(*chunk) for chunk in zip(*[x.split(4) for x in inputs], strict=True)]
    x, y, scales = zip(*parts, strict=True)
    contrastive(torch.cat(x), torch.cat(y), scales[0]).backward()
    following = torch.rand(3), torch.rand(3, device=device)
    torch.manual_seed(3)
    GradCache(model, contrastive, 4).step(*inputs)
    assert all(
        torch.equal(now, then)
        for now, then in zip((torch.rand(3), torch.rand(3, device=device)), following, strict=True)
    )
    assert_equal_to_rounding(gradients(model), gradients(reference), 10)


def test_random_numbers_of_the_loss_count_as_drawn():
    def loss(x, y, scale):
        return contrastive(x, y, scale) * torch.rand((), dtype=x.dtype)

    torch.manual_seed(5)
    torch.rand((), dtype=torch.float64)
    expected = torch.rand(())
    model = Towers()
    torch.manual_seed(5)
    GradCache(model, loss, 4).step(*batch(10, 0))
    assert torch.equal(torch.rand(()), expected)


def test_the_scaler_scales_every_gradient():
    model = towers(dtype=torch.float32)
    inputs = batch(10, 0, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    _, plain = plain_step(model, contrastive, *inputs)
    cache = GradCache(model, contrastive, 4, backward=lambda loss: scaler.scale(loss).backward())
    cache.step(*inputs)
    scaled = {name: 2.0**10 * gradient for name, gradient in plain.items()}
    assert_equal_to_rounding(gradients(model), scaled, 10)


def test_an_infinite_scaled_gradient_is_seen_by_the_scaler():
    model = towers(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=torch.finfo(torch.float32).max)
    cache = GradCache(
        model,
        lambda x, y, scale: 1e6 * contrastive(x, y, scale),
        4,
        backward=lambda loss: scaler.scale(loss).backward(),
    )
    cache.step(*batch(10, 0, torch.float32))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < torch.finfo(torch.float32).max
    for now, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(now, then)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that graphs hold for backward, without those of parameters."""

    def __init__(self, model):
        self.live = self.peak = 0
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
        counter = self

        class Saved:
            def __init__(self, tensor):
                # An output with its graph would keep the node alive that saved it.
                self.tensor = tensor.detach()
                self.bytes = tensor.nbytes * (tensor.data_ptr() not in parameters)
                counter.live += self.bytes
                counter.peak = max(counter.peak, counter.live)

            def __del__(self):
                counter.live -= self.bytes

        super().__init__(Saved, lambda saved: saved.tensor)

    def __enter__(self):
        super().__enter__()
        return self


def test_no_more_than_one_chunk_of_activations_is_alive():
    model = towers(width=32)
    inputs = batch(64, 0, width=32)
    with SavedBytes(model) as one_chunk:
        outputs = model(*[x[:8] for x in inputs])
    del outputs
    features = [x.detach().requires_grad_() for x in model(*inputs)]
    with SavedBytes(model) as of_loss:
        loss = contrastive(*features)
    del loss
    with SavedBytes(model) as chunked:
        GradCache(model, contrastive, 8).step(*inputs)
    assert one_chunk.peak > 0
    assert chunked.live == 0
    assert chunked.peak <= max(one_chunk.peak, of_loss.peak)


def test_autocast_holds_for_forward_passes_and_the_loss_and_not_for_backward_passes():
    forward, backward = [], []

    def watch(tensor):
        forward.append(torch.is_autocast_enabled("cpu"))
        if tensor.requires_grad:
            tensor.register_hook(lambda _: backward.append(torch.is_autocast_enabled("cpu")))

    def loss(x, y, scale):
        value = contrastive(x, y, scale)
        watch(value)
        return value

    model = towers(dtype=torch.float32)
    model.text.register_forward_hook(lambda _, inputs, output: watch(output))
    with torch.autocast("cpu", torch.bfloat16):
        GradCache(model, loss, 4).step(*batch(10, 0, torch.float32))
    assert forward == [True] * 7
    assert backward == [False] * 4


def test_autocast_gives_the_gradients_of_the_plain_step():
    """Also a second step inside the same context sees the weights that have changed."""
    model = towers(dtype=torch.float32)
    reference = copy.deepcopy(model)
    inputs = batch(8, 0, torch.float32)
    cache = GradCache(model, contrastive, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            model.zero_grad()
            loss = cache.step(*inputs)
            _descend(model)
    for _ in range(2):
        reference.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            expected = contrastive(*reference(*inputs))
        expected.backward()
        _descend(reference)
    assert torch.equal(loss, expected.detach())
    # One chunk computes what the plain step does, operation by operation.
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, gradients(reference)[name]), name


@torch.no_grad()
def _descend(model):
    for parameter in model.parameters():
        parameter.sub_(parameter.grad)


def test_outputs_by_name_reach_the_loss_by_name():
    class Named(Towers):
        def forward(self, images, texts):
            x, y, scale = super().forward(images, texts)
            return {"y": y, "scale": scale, "unused": None, "x": x}

    def loss(x, y, scale, unused):
        assert unused is None
        return contrastive(x, y, scale)

    model, inputs = towers(), batch(10, 0)
    named = Named()
    named.load_state_dict(model.state_dict())
    _, plain = plain_step(model, contrastive, *inputs)
    GradCache(named, loss, 4).step(*inputs)
    assert_equal_to_rounding(gradients(named), plain, 10)


def test_one_output_integers_and_inputs_without_a_batch():
    layer = nn.Linear(WIDTH, 1).double()
    x, y = batch(10, 0)
    labels = torch.arange(10)
    seen = []

    def model(x, factor, offset, labels, *, mode):
        seen.append((factor.shape, offset, mode))
        return layer(factor * x) + offset, labels

    def loss(z, labels):
        assert torch.equal(labels, torch.arange(10))
        return (labels * z.squeeze(1)).square().mean()

    GradCache(model, loss, 4).step(
        x, torch.tensor(2.0, dtype=torch.float64), 0.5, labels=labels, mode="train"
    )
    ours = gradients(layer)
    layer.zero_grad()
    loss(layer(2 * x) + 0.5, labels).backward()
    assert_equal_to_rounding(ours, gradients(layer), 10)
    assert seen == [(torch.Size([]), 0.5, "train")] * 6

    layer.zero_grad()
    GradCache(layer, lambda z: z.square().sum(), 3).step(y)
    ours = gradients(layer)
    layer.zero_grad()
    layer(y).square().sum().backward()
    assert_equal_to_rounding(ours, gradients(layer), 10)


def test_frozen_tower_and_leaf_inputs():
    model = towers()
    model.image.requires_grad_(False)
    images, texts = batch(10, 0)
    texts.requires_grad_()
    contrastive(*model(images, texts)).backward()
    plain = {**gradients(model), "texts": texts.grad}
    model.zero_grad()
    texts.grad = None
    GradCache(model, contrastive, 4).step(images, texts)
    assert all(parameter.grad is None for parameter in model.image.parameters())
    assert_equal_to_rounding({**gradients(model), "texts": texts.grad}, plain, 10)


def test_parameters_of_the_loss_get_their_gradients():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, x, y, scale):
            return contrastive(x, y, scale * self.log_scale.exp())

    model, loss, inputs = towers(), Scaled(), batch(10, 0)
    _, plain = plain_step(model, loss, *inputs)
    plain["loss"] = loss.log_scale.grad.clone()
    loss.zero_grad()
    GradCache(model, loss, 4).step(*inputs)
    assert_equal_to_rounding({**gradients(model), "loss": loss.log_scale.grad}, plain, 10)


@pytest.mark.parametrize("value", [0, -3])
def test_chunk_size_below_one(value):
    with pytest.raises(ValueError, match=f"chunk_size: expected at least one row, got {value}"):
        GradCache(towers(), contrastive, value)


@pytest.mark.parametrize("value", [2.0, True, None, "8"])
def test_chunk_size_of_another_type(value):
    with pytest.raises(TypeError, match="chunk_size: expected an int"):
        GradCache(towers(), contrastive, value)


@pytest.mark.parametrize("name", ["model", "loss", "backward"])
def test_callables_are_required(name):
    arguments = {"model": towers(), "loss": contrastive, "chunk_size": 4, name: 3}
    with pytest.raises(TypeError, match=f"{name}: expected a callable, got int"):
        GradCache(**arguments)


def _raising(error):
    def function(*_):
        raise error

    return function


X, Y = batch(6, 0)
ROWS = torch.ones(6, 2, dtype=torch.float64)
# Model or None for the towers, loss, inputs, and what the error says.
MISTAKES = {
    "batch sizes": (None, contrastive, (X, Y[:4]), ValueError, "got 6 rows in input 0 and 4 in"),
    "no tensor": (None, contrastive, (3, "a"), ValueError, "at least one tensor"),
    "no leaf": (None, contrastive, (X, Y.clone().requires_grad_() * 2), ValueError, "input 1: exp"),
    "output of a number": (lambda x: (x, 1.0), None, (X,), TypeError, "got float for output 1"),
    "nested output": (lambda x: {"a": [x]}, None, (X,), TypeError, "got list for output 'a'"),
    "no output": (lambda x: None, None, (X,), TypeError, "at least one tensor as output"),
    "rows of an output": (lambda x: x[:1], None, (X,), ValueError, r"expected 4 rows in output 0"),
    "a mean as output": (lambda x: (x, x.mean()), None, (X,), ValueError, "the same for every"),
    "loss of a row": (None, lambda x, y, s: (x * y).sum(1), (X, Y), ValueError, r"got \[6\]"),
    "loss of no tensor": (None, lambda x, y, s: 1.0, (X, Y), TypeError, "got float"),
    "detached": (
        None,
        lambda x, y, s: torch.zeros((), requires_grad=True) * 1,
        (X, Y),
        RuntimeError,
        "no output of the model has a gradient",
    ),
    "model raises": (_raising(KeyError("model")), None, (X,), KeyError, "model"),
    "loss raises": (None, _raising(KeyError("loss")), (X, Y), KeyError, "loss"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_leave_gradients_as_they_were(mistake):
    model, loss, inputs, error, message = MISTAKES[mistake]
    trained = towers()
    GradCache(trained, contrastive, 4).step(X, Y)
    before = list(gradients(trained).values())
    with pytest.raises(error, match=message):
        GradCache(model or trained, loss or contrastive, 4).step(*inputs)
    assert same_gradients(trained, before)


def test_backward_that_does_nothing():
    model = towers()
    cache = GradCache(model, contrastive, 4, backward=lambda loss: None)
    with pytest.raises(RuntimeError, match="let `backward` run"):
        cache.step(X, Y)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_in_the_last_phase_gives_the_random_state_back():
    class Failing(Towers):
        calls = 0

        def forward(self, *inputs):
            self.calls += 1
            if self.calls == 4:
                raise KeyError("the last chunk with gradients")
            return super().forward(*inputs)

    model = Failing(dropout=0.5)
    torch.manual_seed(1)
    with torch.no_grad():
        model(X[:4], Y[:4])
        model(X[4:], Y[4:])
    expected = torch.rand(())
    model.calls = 0
    torch.manual_seed(1)
    with pytest.raises(KeyError, match="the last chunk"):
        GradCache(model, contrastive, 4).step(X, Y)
    assert torch.equal(torch.rand(()), expected)


def test_static_graph_is_refused():
    model = towers()
    # What DistributedDataParallel(static_graph=True) sets, without a process group to wrap with.
    model.static_graph = True
    with pytest.raises(ValueError, match="static_graph=False"):
        GradCache(nn.Sequential(model), contrastive, 4)
