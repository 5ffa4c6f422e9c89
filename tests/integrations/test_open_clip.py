"""open_clip's factories with our losses: the installed release, and the interface of its main."""

import sys
from types import ModuleType, SimpleNamespace

import open_clip
import open_clip.factory
import open_clip_train.main
import pytest
import torch
from torch import nn

import fastvlp.losses
from fastvlp.integrations.open_clip import patch

MODULES = (open_clip, open_clip.factory, open_clip_train.main)


def arguments(**changed):
    chosen = {
        "distill": False, "siglip": False, "model": "ViT-B-32", "local_loss": False,
        "gather_with_grad": False, "rank": 0, "world_size": 1, "horovod": False,
        "loss_dist_impl": None, "coca_caption_loss_weight": 2.0,
        "coca_contrastive_loss_weight": 1.0,
    }  # fmt: skip
    return SimpleNamespace(**{**chosen, **changed})


@pytest.fixture
def release(monkeypatch):
    """The installed open_clip, which makes losses; as it was again after the test."""
    for module in MODULES:
        monkeypatch.setattr(module, "create_loss", module.create_loss)
    return open_clip


class Options(nn.Module):
    """A loss that keeps its options, as open_clip's do."""

    def __init__(self, **options):
        super().__init__()
        vars(self).update(options)


@pytest.fixture
def main(monkeypatch):
    """A stand-in for open_clip's main branch, where a task holds the model and the loss."""

    class ClipLoss(Options):
        def __init__(
            self, local_loss=False, gather_with_grad=False, cache_labels=False, rank=0,
            world_size=1, smoothing=0.0,
        ):  # fmt: skip
            super().__init__(
                local_loss=local_loss, gather_with_grad=gather_with_grad,
                cache_labels=cache_labels, rank=rank, world_size=world_size, smoothing=smoothing,
            )  # fmt: skip

    class SigLipLoss(Options):
        def __init__(self, rank=0, world_size=1, dist_impl=None, chunk_size=0):
            super().__init__(
                rank=rank, world_size=world_size, dist_impl=dist_impl, chunk_size=chunk_size
            )

    class DistillClipLoss(ClipLoss):
        pass

    def create_task(args, model, dist_model=None):
        task = nn.Module()
        task.model = model
        if args.distill:
            task.loss = DistillClipLoss(args.local_loss, args.gather_with_grad)
        elif args.siglip:
            task.loss = SigLipLoss(dist_impl=args.loss_dist_impl, chunk_size=64)
        elif args.model != "genlip":
            task.loss = ClipLoss(
                args.local_loss, args.gather_with_grad, smoothing=getattr(args, "smoothing", 0.0)
            )
        return task

    for name in [name for name in sys.modules if name.partition(".")[0] == "open_clip"]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "open_clip_train"]:
        monkeypatch.delitem(sys.modules, name)
    package, losses, script = map(ModuleType, ("open_clip", "open_clip.loss", "open_clip_train"))
    for kind in (ClipLoss, SigLipLoss, DistillClipLoss):
        setattr(losses, kind.__name__, kind)
    package.loss, package.create_task, package.__version__ = losses, create_task, "4.2.0"
    script.create_task = create_task
    for module in (package, losses, script):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


CHOICES = [
    ({}, fastvlp.losses.ClipLoss),
    ({"siglip": True}, fastvlp.losses.SigLipLoss),
    ({"distill": True}, "DistillClipLoss"),
    ({"model": "coca_ViT-B-32"}, "CoCaLoss"),
]


@pytest.mark.parametrize("changed, kind", CHOICES)
@pytest.mark.parametrize("module", MODULES)
def test_the_chosen_loss_stays_chosen(release, module, changed, kind):
    assert patch() == [f"{m.__name__}.create_loss" for m in MODULES]
    made = module.create_loss(arguments(**changed))
    if isinstance(kind, str):
        assert type(made) is getattr(open_clip.loss, kind)
    else:
        assert type(made) is kind


def test_options_are_kept_and_a_second_call_changes_nothing(release):
    assert patch() == patch()
    args = arguments(local_loss=True, gather_with_grad=True)
    loss = open_clip.create_loss(args)
    assert (loss.local_loss, loss.gather_with_grad, loss.cache_labels) == (True, True, True)
    assert not isinstance(open_clip.create_loss._factory, type(open_clip.create_loss))
    args = arguments(siglip=True, loss_dist_impl="gather")
    assert open_clip.create_loss(args).dist_impl == "gather"


def test_the_patched_loss_has_the_same_value(release):
    theirs = open_clip.create_loss(arguments())
    patch()
    ours = open_clip.create_loss(arguments())
    image, text = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        ours(image, text, torch.tensor(3.0), output_dict=True),
        theirs(image, text, torch.tensor(3.0), output_dict=True),
    )


def test_what_fastvlp_refuses_raises_when_the_loss_is_made(release):
    patch()
    with pytest.raises(ValueError, match="use_horovod: only torch.distributed is supported"):
        open_clip.create_loss(arguments(horovod=True))
    with pytest.raises(ValueError, match="local_loss=True needs gather_with_grad=True"):
        open_clip.create_loss(arguments(local_loss=True, world_size=2))


def test_tasks_of_main_get_the_loss(main):
    assert patch() == ["open_clip.create_task", "open_clip_train.create_task"]
    script, model = sys.modules["open_clip_train"], nn.Linear(2, 2)
    task = script.create_task(arguments(local_loss=True, gather_with_grad=True), model=model)
    assert type(task.loss) is fastvlp.losses.ClipLoss and task.model is model
    assert task.loss.local_loss and task.loss.gather_with_grad
    siglip = main.create_task(arguments(siglip=True, loss_dist_impl="shift"), model)
    assert type(siglip.loss) is fastvlp.losses.SigLipLoss
    assert (siglip.loss.dist_impl, siglip.loss.chunk_size) == ("shift", 64)
    assert type(main.create_task(arguments(distill=True), model).loss) is main.loss.DistillClipLoss
    assert not hasattr(main.create_task(arguments(model="genlip"), model), "loss")


def test_an_option_that_fastvlp_does_not_know_is_refused(main):
    patch()
    with pytest.raises(RuntimeError, match="smoothing: open_clip's ClipLoss has smoothing=0.1"):
        main.create_task(arguments(smoothing=0.1), nn.Linear(2, 2))


def test_an_open_clip_without_factories_is_refused(main):
    del main.create_task, sys.modules["open_clip_train"].create_task
    with pytest.raises(
        RuntimeError, match="open_clip 4.2.0 has no function create_loss or create_"
    ):
        patch()


def test_a_missing_open_clip_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match="open_clip: expected to be installed; pip install"):
        patch()
