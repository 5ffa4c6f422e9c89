"""ALBEF's pretraining step: kernels against the plain form, order of its state, faults, storage."""

import pytest
import torch
from fastvlp_tests.albef_cases import LENGTHS, batch, make, step
from fastvlp_tests.tolerance import AddedTerms, assert_as_accurate, epsilon

from fastvlp.models import albef, base
from fastvlp.optim import AdamWEma


def double(arguments):
    return [arguments[0].double(), *arguments[1:]]


@pytest.mark.parametrize("ids", [None, torch.tensor([7, 8, 7, 9])], ids=["pairs", "equal ids"])
def test_losses_and_gradients_agree_with_the_plain_form(ids):
    model = make(queue_ids=ids is not None)
    arguments = batch(model.config)
    ours = step(model, arguments, ids=ids)
    eager = step(model.use_reference(), arguments, ids=ids)
    with AddedTerms() as terms:
        exact = step(model.double(), double(arguments), ids=ids)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == exact.keys() >= trained.keys()
    for name, wanted in exact.items():
        # The gradient with respect to a bias of keys is zero in exact arithmetic.
        size = terms.of(trained[name]) if name.endswith("key.bias") else wanted
        floor = epsilon(torch.float32) * size.norm().item()
        assert_as_accurate(name, ours[name], eager[name], wanted, floor=floor)


def test_a_teacher_in_bfloat16_is_near():
    model, low = make(), make(momentum_copy="bfloat16")
    arguments = batch(model.config)
    near, exact = step(low, arguments), step(model, arguments)
    eager = step(low.use_reference(), arguments)
    assert low.teacher.vision_proj.weight.dtype == torch.bfloat16
    for name in ("itc", "itm", "mlm"):
        assert_as_accurate(
            name, near[name], eager[name], exact[name].double(), epsilon(torch.bfloat16)
        )


def test_one_pair_has_no_negatives_and_no_label_gives_no_loss():
    model = make()
    arguments = batch(model.config, [6])
    arguments[4] = torch.full_like(arguments[4], -100)
    found = step(model, arguments)
    plain = step(model.use_reference(), arguments)
    assert found["mlm"] == 0 == plain["mlm"]
    torch.testing.assert_close(found["itm"], plain["itm"], rtol=1e-5, atol=0)


def test_lengths_serve_as_mask():
    model = make()
    arguments = batch(model.config)
    with_mask = step(model, arguments)
    arguments[2] = LENGTHS
    assert all(torch.equal(v, with_mask[k]) for k, v in step(model, arguments).items())


def teaching(model):
    """What the momentum encoder holds, and the queue's position, whenever the teacher encodes
    images."""
    seen = []
    tower = model.teacher.visual_encoder
    tower.register_forward_pre_hook(
        lambda *_: seen.append((tower.pos_embed.clone(), int(model.queue.position)))
    )
    return seen


@pytest.mark.parametrize("reference", [False, True])
def test_order_of_the_state(reference):
    """The momentum encoder moves before it teaches; the queue takes features after they were
    contrasted."""
    model = make().use_reference(reference)
    arguments = batch(model.config)
    seen = teaching(model)
    average = model.momentum.module.visual_encoder.pos_embed
    moved = average.lerp(model.student.visual_encoder.pos_embed, 1 - model.config.momentum).detach()
    before = model.queue.image_queue.clone()
    still = step(model, arguments)
    assert torch.equal(model.queue.image_queue, before) and model.momentum.num_updates == 0
    first = step(model, arguments, update=True)
    torch.testing.assert_close(average, moved)
    torch.testing.assert_close(seen[-1][0], moved)
    assert seen[-1][1] == 0 and model.queue.position == 4 and model.momentum.num_updates == 1
    assert not torch.equal(model.queue.image_queue[:4], before[:4])
    assert torch.equal(model.queue.image_queue[4:], before[4:])
    assert first["itc"] != still["itc"]  # another teacher
    # A step whose momentum encoder the optimiser moved leaves it alone.
    step(model, arguments, update=True, momentum_updated=True)
    torch.testing.assert_close(average, moved)
    assert model.queue.position == 8 and model.momentum.num_updates == 1


def test_the_optimiser_may_move_the_momentum_encoder():
    """AdamWEma at the end of a step is the update at the beginning of the next one."""
    results = []
    for fused in (False, True):
        model = make()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = (
            AdamWEma(trained, lr=1e-2, ema=model.momentum)
            if fused
            else torch.optim.AdamW(trained, lr=1e-2)
        )
        losses = []
        for i in range(3):
            optimizer.zero_grad()
            given = batch(model.config, seed=i)
            # The momentum encoder and the weights start apart, so the first step moves it in both.
            found = model.pretraining_loss(*given, seed=i, momentum_updated=fused and i > 0)
            found.total.backward()
            optimizer.step()
            losses.append(found.total.detach())
        results.append(torch.stack(losses))
    torch.testing.assert_close(*results, rtol=1e-4, atol=0)


def test_temperature_is_clamped():
    model = make()
    for start, end in ((0.9, 0.5), (1e-6, 0.001), (0.2, 0.2)):
        model.temp.data.fill_(start)
        step(model, batch(model.config))
        assert model.temp.item() == pytest.approx(end)


def test_dropout_of_the_teacher():
    arguments = batch(make().config)
    for on in (True, False):
        model = make(dropout=0.5, teacher_dropout=on).train()
        assert model.teacher.training is on and model.student.training
        model.student.eval()
        found = {step(model, arguments)["mlm"].item() for _ in range(2)}
        assert len(found) == (2 if on else 1)


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items() if k != "temp"}


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, torch.zeros(4, 3, 32, 32), "images: expected"),
        (0, torch.zeros(3, 3, 64, 64), "text_ids: expected one text"),
        (1, torch.full((4, 12), 512), "text_ids: expected 0 to 511"),
        (1, torch.zeros(4, 12), "text_ids: expected int64"),
        (1, torch.zeros(4, 65, dtype=torch.int64), "text_ids: expected .* length 1 to 64"),
        (2, [12, 5, 0, 9], "text_mask: expected the first token"),
        (2, [12, 5, 7], "text_mask: expected"),
        (3, torch.zeros(4, 11, dtype=torch.int64), "masked_ids: expected"),
        (4, torch.zeros(4, 12, dtype=torch.int64), "labels: expected -100 where"),
        (4, torch.full((4, 12), -100).index_fill(1, torch.tensor(1), 512), "labels: expected 0 to"),
        (5, 1.5, "alpha: expected 0 to 1"),
    ],
)
def test_bad_input_leaves_the_state(at, value, message):
    model = make()
    before = state_of(model)
    arguments = batch(model.config)
    arguments[at] = value
    with pytest.raises((TypeError, ValueError), match=message):
        model.pretraining_loss(*arguments)
    after = state_of(model)
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_ids_are_for_queues_with_ids():
    with pytest.raises(ValueError, match="ids: expected None"):
        step(make(), batch(make().config), ids=torch.arange(4))
    model = make(queue_ids=True)
    with pytest.raises(ValueError, match="ids: expected ids of the pairs"):
        step(model, batch(model.config))
    with pytest.raises(ValueError, match=r"ids: expected int64 \[4\]"):
        step(model, batch(model.config), ids=torch.arange(3))


def test_what_is_not_finite_is_refused():
    model = make()
    arguments = batch(model.config)
    before = state_of(model)
    arguments[0][0, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="images"):
        model.pretraining_loss(*arguments, check_finite=True)
    arguments = batch(model.config)
    weight = model.student.text_proj.weight.data
    kept = weight[0, 0].clone()
    weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="text_proj"):
        model.pretraining_loss(*arguments, check_finite=True)
    weight[0, 0] = kept
    after = state_of(model)
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_a_step_that_fails_late_can_be_repeated():
    """After an overflow in the fusion layers a repeated step, which is told that the momentum
    encoder has moved, gives what one step alone gives."""
    model, alone = make(), make()
    arguments = batch(model.config)
    queue = model.queue.image_queue.clone()
    kept = model.itm_head.bias.data.clone()
    model.itm_head.bias.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the queues are as they were"):
        model.pretraining_loss(*arguments, check_finite=True)
    assert torch.equal(model.queue.image_queue, queue)
    model.itm_head.bias.data.copy_(kept)
    assert model.momentum.num_updates == 1
    for each, moved in ((model, True), (alone, False)):
        each.pretraining_loss(*arguments, check_finite=True, momentum_updated=moved, seed=3)
    ours, theirs = model.state_dict(), alone.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())


@pytest.mark.parametrize("ids", [None, torch.tensor([7, 8, 7, 9])], ids=["pairs", "equal ids"])
def test_a_step_leaves_the_state_and_gives_the_features_for_the_queues(ids):
    model, alone = (make(queue_ids=ids is not None) for _ in range(2))
    arguments = batch(model.config)
    for each in (model, alone):
        each.momentum.update()
    before = state_of(model)
    losses, features = model.pretraining_step(*arguments, ids=ids, seed=3)
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())
    wanted = alone.pretraining_loss(*arguments, ids=ids, momentum_updated=True, seed=3)
    assert losses == wanted
    # One pass or two: the queues take both alike.
    model.enqueue([albef.MomentumFeatures(*(t if t is None else t[part] for t in features))
                   for part in (slice(3), slice(3, 4))])  # fmt: skip
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in
               model.state_dict().items())  # fmt: skip


def test_forward_gives_losses_or_the_step():
    model = make()
    arguments = batch(model.config)
    step = model(*arguments, return_features=True, seed=3)
    assert isinstance(step, albef.Step) and model.queue.position == 0
    losses = model(*arguments, update=False, seed=3)
    assert isinstance(losses, albef.Losses) and losses == step.losses


@pytest.mark.parametrize("copy", [None, "bfloat16"])
def test_save_and_load(tmp_path, copy):
    model = make(momentum_copy=copy).eval()
    step(model, batch(model.config), update=True)
    albef.save(model, tmp_path / "model")
    loaded = albef.load(tmp_path / "model")
    assert loaded.config == model.config and loaded.momentum.num_updates == 1
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())
    found, wanted = (step(m, batch(m.config)) for m in (loaded, model))
    assert all(torch.equal(found[k], v) for k, v in wanted.items())
    with pytest.raises(ValueError, match="expected clip"):
        base.load(tmp_path / "model", "clip")


def test_without_pretraining_there_is_no_momentum_encoder():
    model = make(pretraining=False)
    assert model.momentum is None and not any("queue" in name for name in model.state_dict())
    for compute in (model.pretraining_loss, model.pretraining_step):
        with pytest.raises(RuntimeError, match="pretraining=True"):
            compute(*batch(model.config))
    with pytest.raises(RuntimeError, match="enqueue: .*pretraining=True"):
        model.enqueue([])
    with pytest.raises(RuntimeError, match="teacher: .*without a momentum encoder"):
        model.teacher  # noqa: B018
    with pytest.raises(RuntimeError, match="refresh_copy: .*without a momentum encoder"):
        model.refresh_copy()
    model.reset_momentum()


def test_sizes_by_name_and_their_faults():
    assert albef.CONFIGS["base"].image_size == 256
    for changes, message in (
        (dict(vision_layers=0), "vision_layers"),
        (dict(dropout=2.0), "dropout"),
        (dict(momentum_copy="float8"), "momentum_copy"),
        (dict(vision_heads=3), "heads"),
        (dict(image_size=60), "patch"),
    ):
        with pytest.raises(ValueError, match=message):
            albef.create("tiny", **changes)
    with pytest.raises(ValueError, match="name: expected one of"):
        albef.create("huge")
