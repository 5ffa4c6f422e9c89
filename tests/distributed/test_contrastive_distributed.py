"""The losses over ranks: the gradient of the full batch, whatever the shards and the schedule."""

import itertools
import re
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from fastvlp_tests import gloo_ranks
from fastvlp_tests.contrastive_cases import features, run
from fastvlp_tests.tolerance import assert_as_accurate, epsilon

SIZES = {2: (37, 70), 3: (64, 1, 40), 4: (16, 33, 0, 50)}
SCALE, BIAS, DIM = 14.3, -9.0, 48
AMPLE, SOME = 1 << 20, 20_000


def batch(sizes, dtype):
    return features(sum(sizes), DIM, dtype, "cpu")


def compute(rank, sizes, jobs):
    """Every job's loss and gradients on this rank, averaged over ranks as DDP would."""
    from fastvlp.ops import contrastive, sigmoid_contrastive

    begin = sum(sizes[:rank])
    mine = slice(begin, begin + sizes[rank])
    found = {}
    for job in jobs:
        dtype, schedule, direction, comm_dtype, workspace_bytes = job
        image, text = (t[mine] for t in batch(sizes, dtype))
        if schedule == "sigmoid":
            loss, options = sigmoid_contrastive, {}
        else:
            loss, options = contrastive, {"schedule": schedule, "direction": direction}
        result = run(loss, image, text, SCALE, BIAS, group=dist.group.WORLD,
                     comm_dtype=comm_dtype, workspace_bytes=workspace_bytes,
                     **options)  # fmt: skip
        scalars = torch.stack((result.loss, result.scale, result.bias))
        dist.all_reduce(scalars)
        found[job] = (
            result.image / len(sizes),
            result.text / len(sizes),
            scalars / len(sizes),
        )
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_gradients_of_the_full_batch(world_size):
    sizes = SIZES[world_size]
    directions = ("both", "image_to_text", "text_to_image")
    dtypes = (torch.float32, torch.bfloat16)
    schedules = ("gather", "ring")
    jobs = list(itertools.product(dtypes, schedules, directions, (None,), (AMPLE,)))
    jobs += [(dtype, "sigmoid", "both", None, AMPLE) for dtype in dtypes]
    jobs += itertools.product(
        dtypes, (*schedules, "sigmoid"), ("both",), (torch.bfloat16,), (AMPLE,)
    )
    # Workspaces that keep some of the logits and none.
    jobs += itertools.product((torch.float32,), schedules, ("both",), (None,), (SOME, 1))
    assert_those_of_one_process(gloo_ranks.run(world_size, compute, sizes, jobs), sizes, jobs)


def assert_those_of_one_process(found, sizes, jobs):
    from fastvlp.ops import contrastive_reference, sigmoid_contrastive_reference

    assert all(isinstance(result, dict) for result in found), found
    for job in jobs:
        dtype, schedule, direction, comm_dtype, _ = job
        image, text = batch(sizes, dtype)
        if schedule == "sigmoid":
            reference, options = sigmoid_contrastive_reference, {}
        else:
            reference, options = contrastive_reference, {"direction": direction}
        exact = run(reference, image, text, SCALE, BIAS, torch.float64, **options)
        # What is sent in bfloat16 is compared with what plain PyTorch makes of bfloat16 features.
        eager_dtype = comm_dtype or dtype
        eager = run(reference, image.to(eager_dtype), text.to(eager_dtype), SCALE, BIAS, **options)
        ours = [torch.cat([result[job][i] for result in found]) for i in (0, 1)]
        for name, got in zip(("image", "text"), ours, strict=True):
            wanted = getattr(exact, name)
            floor = 4 * epsilon(eager_dtype) * wanted.norm().item()
            assert_as_accurate(f"{job} {name}", got, getattr(eager, name), wanted, floor)
        for index, name in enumerate(("loss", "scale", "bias")):
            wanted = getattr(exact, name)
            if name == "bias" and schedule != "sigmoid":
                wanted = torch.zeros_like(wanted)
            for result in found:
                floor = 4 * epsilon(eager_dtype) * max(1.0, abs(wanted.item()))
                got = result[job][2][index]
                assert_as_accurate(f"{job} {name}", got, getattr(eager, name), wanted, floor)


def bad_rank(rank, fault):
    from fastvlp.ops import contrastive

    image, text = features(8, 16, torch.float32, "cpu")
    arguments = {"image_features": image, "text_features": text, "logit_scale": 5.0}
    if rank == 1:
        arguments.update(fault)
    return contrastive(**arguments, group=dist.group.WORLD)


# What rank 1 passes, and what every rank then says.
FAULTS = [
    ({"logit_scale": float("nan")}, "rank 1 .*logit_scale: expected a finite value, got nan"),
    ({"text_features": torch.zeros(7, 16)}, "rank 1 .*text_features: .*got (7, 16)"),
    (
        {"image_features": torch.zeros(8, 9), "text_features": torch.zeros(8, 9)},
        "width: expected the same on every rank, got 16 on rank 0 .* and 9 on rank 1",
    ),
    ({"image_features": torch.zeros(8, 16).double()}, "rank 1 .*text_features: .*dtype"),
    ({"schedule": "ring"}, "schedule: expected the same on every rank"),
    ({"direction": "down"}, "rank 1 .*direction: expected one of"),
    ({"workspace_bytes": 5}, "workspace_bytes: expected the same on every rank"),
    ({"image_features": None}, "rank 1 .*image_features: expected a torch.Tensor, got None"),
]


@pytest.fixture(scope="module")
def complaints():
    # One group for all faults: it has to be of use after each of them.
    jobs = {index: (bad_rank, fault) for index, (fault, _) in enumerate(FAULTS)}
    return gloo_ranks.run(3, gloo_ranks.several, jobs)


@pytest.mark.parametrize("index", range(len(FAULTS)))
def test_every_rank_raises_and_names_the_one(complaints, index):
    pattern = re.escape(FAULTS[index][1]).replace(r"\.\*", ".*").replace(r"\ ", " ")
    for results in complaints:
        result = results[index]
        assert isinstance(result, str) and result.startswith("RuntimeError"), result
        assert re.search(pattern, result), result


def open_clip_pairs(rank):
    """Both losses on the same shards, gradients w.r.t. features and by a parameter under DDP."""
    import open_clip.loss
    from torch.nn.parallel import DistributedDataParallel

    from fastvlp import losses

    world_size = dist.get_world_size()
    image, text = (t.chunk(world_size)[rank] for t in features(60, 24, torch.float32, "cpu"))
    found = {}
    for local_loss, name in itertools.product((True, False), ("open_clip", "ours")):
        torch.manual_seed(0)
        model = DistributedDataParallel(torch.nn.Linear(24, 24, bias=False))
        module = open_clip.loss if name == "open_clip" else losses
        loss = module.ClipLoss(local_loss, True, rank=rank, world_size=world_size)
        value = loss(model(image), model(text), torch.tensor(10.0))
        value.backward()
        found[name, local_loss] = value.detach(), model.module.weight.grad
    sigmoid = losses.SigLipLoss(rank=rank, world_size=world_size)
    theirs = open_clip.loss.SigLipLoss(rank=rank, world_size=world_size)
    found["sigmoid"] = [f(image, text, torch.tensor(9.0), torch.tensor(-8.0)) for f in
                        (sigmoid, theirs)]  # fmt: skip
    return found


def open_clip_subclasses(rank):
    """open_clip's distillation on its own ClipLoss and on ours: values, gradients w.r.t.
    features."""
    import open_clip.loss

    from fastvlp import losses

    own = vars(open_clip.loss.DistillClipLoss)
    methods = {name: own[name] for name in ("dist_loss", "forward")}
    pairs = [features(12, 24, torch.float32, "cpu", seed=seed) for seed in (0, 1)]
    shards = [t.chunk(2)[rank] for pair in pairs for t in pair]
    found = {}
    for module, local_loss in itertools.product((losses, open_clip.loss), (True, False)):
        kind = type("Distill", (module.ClipLoss,), methods)
        loss = kind(local_loss, True, rank=rank, world_size=2)
        image, text, *teacher = (t.clone().requires_grad_() for t in shards)
        scale = torch.tensor(10.0)
        values = loss(image, text, scale, *teacher, torch.tensor(8.0))
        found[module.__name__, local_loss] = [
            *values, *torch.autograd.grad(sum(values), (image, text, *teacher))
        ]  # fmt: skip
    return found


def uneven_logits(rank):
    from fastvlp import losses

    image, text = features(3 + rank, 8, torch.float32, "cpu")
    losses.ClipLoss(True, True, rank=rank, world_size=2).get_logits(image, text, 5.0)


def default_flags(rank):
    """Gradients w.r.t. features after DDP's averaging, with open_clip's flags, and of the batch."""
    import open_clip.loss

    from fastvlp import losses
    from fastvlp.ops import contrastive_reference

    whole = [t.requires_grad_() for t in features(12, 24, torch.float32, "cpu")]
    exact = torch.autograd.grad(contrastive_reference(*whole, 10.0), whole)
    found = []
    for module in (open_clip.loss, losses):
        shards = [t.detach().chunk(2)[rank].clone().requires_grad_() for t in whole]
        loss = module.ClipLoss(rank=rank, world_size=2)(*shards, torch.tensor(10.0))
        found.append([gradient / 2 for gradient in torch.autograd.grad(loss, shards)])
    return *found, [gradient.chunk(2)[rank] for gradient in exact]


def before_init_process_group(make):
    """A loss made as trainers do that construct it before there are ranks."""
    with mock.patch.object(dist, "is_initialized", return_value=False):
        return make()


def early_loss(rank):
    from fastvlp import losses

    image, text = (t.chunk(2)[rank] for t in features(12, 8, torch.float32, "cpu"))
    same = []
    for kind in (losses.ClipLoss, losses.SigLipLoss):
        early = [
            before_init_process_group(lambda: kind(rank=rank, world_size=2))  # noqa: B023
            for _ in range(2)
        ]
        early[1] = torch.compile(early[1], backend="aot_eager")
        value = kind(rank=rank, world_size=2)(image, text, 5.0)
        same += [torch.equal(value, loss(image, text, 5.0)) for loss in early]
    return same


def early_wrong_rank(rank):
    from fastvlp import losses

    image, text = features(6, 8, torch.float32, "cpu")
    return before_init_process_group(lambda: losses.ClipLoss(world_size=2))(image, text, 5.0)


def without_gather_with_grad(rank):
    from fastvlp import losses

    return losses.ClipLoss(local_loss=True, rank=rank, world_size=2)


def wrong_rank(rank):
    from fastvlp import losses

    return losses.SigLipLoss(rank=0, world_size=3)


def subgroup_and_compiled(rank):
    from fastvlp.ops import contrastive, contrastive_reference

    group = [dist.new_group([0]), dist.new_group([1, 2])][rank > 0]
    image, text = features(30, 8, torch.float32, "cpu")
    expected = contrastive_reference(image, text, 5.0)
    if rank == 0:
        return torch.allclose(contrastive(image, text, 5.0, group=group), expected)
    half = slice(0, 10) if rank == 1 else slice(10, 30)
    leaves = [t[half].clone().requires_grad_() for t in (image, text)]

    def loss(x, y):
        return contrastive(x, y, torch.tensor(5.0), group=group)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    gradient = torch.autograd.grad(compiled, leaves)
    eager = loss(*leaves)
    again = torch.autograd.grad(eager, leaves)
    same = [torch.equal(a, b) for a, b in zip(gradient, again, strict=True)]
    total = eager.detach().clone()
    dist.all_reduce(total, group=group)
    return all(same) and torch.equal(compiled, eager) and torch.allclose(total / 2, expected)


def test_subgroups_and_compile():
    assert gloo_ranks.run(3, subgroup_and_compiled) == [True, True, True]


def second_derivative(rank):
    from fastvlp.ops import contrastive

    image, text = features(8, 4, torch.float32, "cpu")
    image.requires_grad_()
    loss = contrastive(image, text, 5.0, group=dist.group.WORLD)
    (gradient,) = torch.autograd.grad(loss, image, create_graph=True)
    gradient.sum().backward()


def distributed_features(rank, placement, name="features"):
    """The loss of DTensors of this placement, as its value, by features of the whole batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    from fastvlp.ops import contrastive, contrastive_reference, sigmoid_contrastive

    mesh = init_device_mesh("cpu", (2,))
    plain = [t.requires_grad_() for t in features(8, 4, torch.float32, "cpu")]
    scale = torch.tensor([5.0, 6.0])[:1].requires_grad_()
    expected = torch.autograd.grad(contrastive_reference(*plain, scale), [*plain, scale])

    def spread(t, on):
        return distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() if on else t

    leaves = [*(spread(t, name == "features") for t in plain), spread(scale, name == "scale")]
    sigmoid_contrastive(*leaves)
    found = torch.autograd.grad(contrastive(*leaves), leaves)
    found = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted)
    return "equal"


def compiled_losses(rank):
    """Loss modules under torch.compile against themselves."""
    from fastvlp import losses

    image, text = (t.chunk(2)[rank].requires_grad_() for t in features(12, 8, torch.float32, "cpu"))
    scalars = torch.tensor(5.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    arguments, same = (image, text, *scalars), []
    for loss in (
        losses.ClipLoss(False, True, rank=rank, world_size=2),
        losses.ClipLoss(True, True, rank=rank, world_size=2, schedule="ring"),
        losses.SigLipLoss(rank=rank, world_size=2),
    ):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        values = [module(*arguments) for module in (loss, compiled)]
        gradients = [torch.autograd.grad(value, arguments) for value in values]
        same += [torch.equal(*values), *map(torch.equal, *gradients)]
    return same


# Two ranks of which one has no pairs, or none has.
EMPTY = ((37, 0), (0, 70), (0, 0))
EMPTY_JOBS = [
    *itertools.product(
        (torch.float32, torch.bfloat16), ("gather", "ring", "sigmoid"), ("both",), (None,), (AMPLE,)
    ),
    (torch.float32, "gather", "image_to_text", torch.bfloat16, 1),
    (torch.float32, "ring", "text_to_image", None, 1),
]


def jobs_of_two():
    from torch.distributed.tensor import Replicate, Shard

    return {
        **{f"pairs {sizes}": (compute, sizes, EMPTY_JOBS) for sizes in EMPTY},
        "open_clip": (open_clip_pairs,),
        "without gather_with_grad": (without_gather_with_grad,),
        "wrong rank": (wrong_rank,),
        "second derivative": (second_derivative,),
        "sharded features": (distributed_features, Shard(0)),
        "sharded scale": (distributed_features, Shard(0), "scale"),
        "replicated features": (distributed_features, Replicate()),
        "replicated scale": (distributed_features, Replicate(), "scale"),
        "compiled": (compiled_losses,),
        "open_clip subclasses": (open_clip_subclasses,),
        "uneven logits": (uneven_logits,),
        "default flags": (default_flags,),
        "early": (early_loss,),
        "early wrong rank": (early_wrong_rank,),
    }


@pytest.fixture(scope="module")
def pair():
    return gloo_ranks.run(2, gloo_ranks.several, jobs_of_two())


@pytest.mark.parametrize("sizes", EMPTY)
def test_ranks_without_pairs_take_part(pair, sizes):
    assert_those_of_one_process([results[f"pairs {sizes}"] for results in pair], sizes, EMPTY_JOBS)


def test_same_as_open_clip_under_ddp(pair):
    for results in pair:
        found = results["open_clip"]
        assert isinstance(found, dict), found
        for local_loss in (True, False):
            for ours, theirs in zip(
                found["ours", local_loss], found["open_clip", local_loss], strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(*found["sigmoid"], rtol=2e-5, atol=1e-6)


def test_subclasses_of_open_clip(pair):
    for results in pair:
        found = results["open_clip subclasses"]
        assert isinstance(found, dict), found
        for local_loss in (True, False):
            ours, theirs = (
                found[name, local_loss] for name in ("fastvlp.losses", "open_clip.loss")
            )
            for mine, wanted in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, wanted, rtol=2e-5, atol=1e-6)


def test_by_open_clips_default_flags_gradients_are_those_of_the_batch(pair):
    for results in pair:
        theirs, ours, exact = results["default flags"]
        for their, mine, wanted in zip(theirs, ours, exact, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=2e-5, atol=1e-7)
            torch.testing.assert_close(2 * their, wanted, rtol=2e-5, atol=1e-7)


def test_losses_made_before_there_are_ranks(pair):
    assert [results["early"] for results in pair] == [[True] * 4] * 2


REFUSED = {
    "without gather_with_grad": "gather_with_grad: local_loss=True needs",
    "wrong rank": "rank, world_size: expected",
    "uneven logits": "ValueError: image_features: expected equally many on every rank",
    "early wrong rank": "rank 1 of the group: ValueError: rank, world_size: expected 1, 2",
    "second derivative": "no second derivative",
    "sharded features": "TypeError: image_features: expected a plain tensor or a replicated DTenso",
    "sharded scale": "TypeError: logit_scale: expected a plain tensor or a replicated DTensor",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(pair, name):
    for results in pair:
        assert isinstance(results[name], str) and REFUSED[name] in results[name], results[name]


@pytest.mark.parametrize("name", ["replicated features", "replicated scale"])
def test_replicated_dtensors_are_taken(pair, name):
    assert [results[name] for results in pair] == ["equal"] * 2


def test_modules_inside_compile(pair):
    assert [results["compiled"] for results in pair] == [[True] * 15] * 2
