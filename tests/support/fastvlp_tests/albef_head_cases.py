"""Small fine-tuned ALBEF models, their batches, and how their two forms are compared."""

import torch

from fastvlp_tests.tolerance import AddedTerms, assert_as_accurate, epsilon

QUIET = dict(dropout=0.0, attention_dropout=0.0)
LENGTHS = [9, 4, 6, 5]


def fresh(create, **overrides):
    """A tiny model without dropout, as `create` makes it, the same in every process."""
    torch.manual_seed(0)
    return create("tiny", **(QUIET | overrides))


def disturb(model):
    """No parameter at a value that hides a mistake, the momentum encoder apart from the weights."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if model.momentum is not None:
        model.refresh_copy()
    return model


def make_images(*shape, seed=1):
    return torch.randn(*shape, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def sentences(count, length, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 512, (count, length), generator=generator)


def with_gradients(model, loss):
    """What `loss(model)` gives, by name, and the gradient of every trained parameter."""
    model.zero_grad()
    losses = loss(model)
    losses = losses._asdict() if hasattr(losses, "_asdict") else {"total": losses}
    losses["total"].backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, g in trained.items() if g is None] == []
    return {k: v.detach() for k, v in losses.items()} | {n: g.clone() for n, g in trained.items()}


def assert_forms_agree(model, loss, double_loss):
    """Kernels are as accurate as the plain form: losses, and every parameter's gradient.

    Leaves the model in float64.
    """
    ours = with_gradients(model, loss)
    eager = with_gradients(model.use_reference(), loss)
    with AddedTerms() as terms:
        exact = with_gradients(model.double(), double_loss)
    assert ours.keys() == eager.keys() == exact.keys()
    biases = {n: p for n, p in model.named_parameters() if n.endswith("key.bias")}
    for name, wanted in exact.items():
        # The gradient with respect to a bias of keys is zero in exact arithmetic.
        size = terms.of(biases[name]) if name in biases else wanted
        floor = epsilon(torch.float32) * size.norm().item()
        assert_as_accurate(name, ours[name], eager[name], wanted, floor=floor)


def assert_saved_and_loaded(model, folder, load, result):
    """The loaded model has the same weights and gives the same `result(model)`, to the bit."""
    from fastvlp.models import base

    base.save(model.eval(), folder / "model")
    loaded = load(folder / "model")
    assert type(loaded) is type(model) and loaded.config == model.config
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items() if isinstance(v, torch.Tensor))
    assert torch.equal(result(loaded), result(model))
