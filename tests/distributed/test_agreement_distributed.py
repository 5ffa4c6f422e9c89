"""What fails or differs on one rank is raised by all ranks, whatever it is, and none waits."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fastvlp_tests import gloo_ranks
from fastvlp_tests.contrastive_cases import features
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastvlp import FeatureQueue, GradCache
from fastvlp.evaluate.features import encode
from fastvlp.evaluate.retrieval import retrieval
from fastvlp.evaluate.zero_shot import accuracy
from fastvlp.losses import ClipLoss, SigLipLoss
from fastvlp.ops import contrastive


def loss(rank, fault, kind=ClipLoss, **options):
    image, text = features(8, 16, torch.float32, "cpu")
    arguments = {"image_features": image, "text_features": text, "logit_scale": 5.0}
    arguments |= fault if rank else {}
    return kind(rank=rank, world_size=2, **options)(**arguments).isfinite().item()


def unlike_options(rank):
    return loss(rank, {}, local_loss=rank == 1, gather_with_grad=True)


def unlike_workspaces(rank):
    return loss(rank, {}, workspace_bytes=2 ** (70 if rank else 20))


def unlike_losses(rank):
    return loss(rank, {"logit_bias": 0.0}, (ClipLoss, SigLipLoss)[rank])


def queue(rank, with_ids=False, ahead=0, start=0):
    made = FeatureQueue(start + 7, 4, with_ids=with_ids and rank == 1, group=dist.group.WORLD)
    made.position += start + ahead * rank
    ids = torch.arange(2) if made.queue_ids is not None else None
    made.enqueue(torch.ones(2, 4), torch.ones(2, 4), ids)


def grad_cache(rank, fails, wrapped=True):
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, images, texts):
            if fails == "model" and rank == 1:
                raise KeyError("no such tower")
            return self.image(images), self.text(texts), torch.tensor(5.0)

    def own_loss(x, y, scale):
        if fails == "pairs" and rank == 0:
            raise KeyError("no such pair")
        if fails in ("pairs", "scale"):
            scale = scale + (rank if fails == "scale" else 0)
            return contrastive(x, y, scale, group=dist.group.WORLD)
        return "no tensor" if fails == "loss" and rank == 1 else (x - y).square().sum()

    images, texts = torch.randn(4, 6), torch.randn(4, 6)
    if fails == "inputs" and rank == 1:
        texts = texts[:3]
    if wrapped:
        step = GradCache(DistributedDataParallel(Towers()), own_loss, 2).step
    else:  # nothing but the loss tells the group
        step = GradCache(Towers(), ClipLoss(rank=rank, world_size=2), 2).step
    return step(images, texts).isfinite().item()


def ranking(rank, fault):
    arguments = {"image_features": torch.eye(6), "text_features": torch.eye(6)}
    arguments |= fault if rank else {}
    return retrieval(**arguments, group=dist.group.WORLD)["text_to_image"]["R@1"]


def classify(rank, fault):
    arguments = {"weights": torch.eye(3), "labels": torch.arange(3)} | (fault if rank else {})
    return accuracy(torch.eye(3), **arguments, group=dist.group.WORLD)["top-1"]


def encoding(rank, fails):
    def images(x):
        if rank == 1 and fails:
            raise ZeroDivisionError("of the encoder")
        return x

    batch = SimpleNamespace(images=torch.eye(3), ids=torch.arange(3), index=torch.arange(3))
    return len(encode([batch], images, group=dist.group.WORLD).ids)


SAME = "expected the same on every rank, got "
# What fails on rank 1, and what every rank says.
CASES = {
    "features None": (
        (loss, {"image_features": None}),
        "rank 1 of the group: TypeError: image_features: expected a torch.Tensor, got None",
    ),
    "sigmoid features None": (
        (loss, {"text_features": None}, SigLipLoss),
        "rank 1 of the group: TypeError: text_features: expected a torch.Tensor, got None",
    ),
    "huge scale": (
        (loss, {"logit_scale": 10**400}),
        "rank 1 of the group: ValueError: logit_scale: expected a number in float64's range",
    ),
    "other scale": ((loss, {"logit_scale": 6.0}), f"logit_scale: {SAME}5.0 on rank 0 .*6.0 on "),
    "other scale tensor": (
        (loss, {"logit_scale": torch.tensor(4.0)}, SigLipLoss),
        f"logit_scale: {SAME}5.0 on rank 0 .*4.0 on rank 1",
    ),
    "other bias": ((loss, {"logit_bias": -3.0}, SigLipLoss), f"logit_bias: {SAME}0.0 .*-3.0 on"),
    "huge workspace": (
        (unlike_workspaces,),
        "rank 1 of the group: ValueError: workspace_bytes: expected a positive number",
    ),
    "local_loss on one rank": ((unlike_options,), f"global_value: {SAME}1 on rank 0 .*0 on rank 1"),
    "different losses": (
        (unlike_losses,),
        "different calls: rank 0 in contrastive, rank 1 in sigmoid_contrastive",
    ),
    "ids on one rank": ((queue, True), f"with_ids: {SAME}0 on rank 0 .*1 on rank 1"),
    "queue ahead": ((queue, False, 3), f"position: {SAME}0.0 on rank 0 .*3.0 on rank 1"),
    "long queue ahead": (
        (queue, False, 1, 200_000),
        f"position: {SAME}200000.0 on rank 0 .*200001.0 on rank 1",
    ),
    "GradCache inputs": ((grad_cache, "inputs"), "rank 1 .*ValueError: inputs: expected the same"),
    "GradCache inputs, no wrapper": (
        (grad_cache, "inputs", False),
        "rank 1 of the group: ValueError: inputs: expected the same batch size",
    ),
    "GradCache model": ((grad_cache, "model"), "rank 1 of the group: KeyError: 'no such tower'"),
    "GradCache loss": ((grad_cache, "loss"), "rank 1 .*TypeError: loss: expected a tensor"),
    "GradCache before its loss's exchange": (
        (grad_cache, "pairs"),
        "rank 0 of the group: KeyError: 'no such pair'",
    ),
    "GradCache in its loss's exchange": (
        (grad_cache, "scale"),
        f"logit_scale: {SAME}5.0 on rank 0 .*6.0 on rank 1",
    ),
    "retrieval sizes": (
        (ranking, {"image_features": torch.eye(6).repeat(2, 1)[:7], "image_of_text": None}),
        "rank 1 of the group: ValueError: image_of_text must be given",
    ),
    "retrieval of fewer": (
        (ranking, {"image_features": torch.eye(6)[:5], "text_features": torch.eye(6)[:5]}),
        f"images: {SAME}6 on rank 0 .*5 on rank 1",
    ),
    "retrieval None": (
        (ranking, {"image_features": None}),
        "rank 1 of the group: TypeError: image_features must be a tensor, got NoneType",
    ),
    "retrieval texts": (
        (ranking, {"image_of_text": torch.arange(6).flip(0)}),
        f"checksum of image_of_text: {SAME}",
    ),
    "retrieval ks": ((ranking, {"ks": (1, 2)}), f"checksum of ks: {SAME}"),
    "labels": (
        (classify, {"labels": torch.tensor([0, 1, 7])}),
        "rank 1 of the group: ValueError: labels: expected 0 to 2",
    ),
    "classes": ((classify, {"weights": torch.eye(4)[:, :3]}), f"classes: {SAME}3 .*4 on rank 1"),
    "encoder": ((encoding, True), "rank 1 of the group: ZeroDivisionError: of the encoder"),
}
# The group has to be of use after all of that.
AFTERWARDS = {
    "loss": ((loss, {}), True),
    "scale of another rounding": ((loss, {"logit_scale": 5.0000005}), True),
    "GradCache": ((grad_cache, None), True),
    "retrieval": ((ranking, {}), 1.0),
    "accuracy": ((classify, {}), 1.0),
    "encode": ((encoding, False), 6),
}


@pytest.fixture(scope="module")
def ranks():
    jobs = {name: job for name, (job, _) in [*CASES.items(), *AFTERWARDS.items()]}
    return gloo_ranks.run(2, gloo_ranks.several, jobs)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_raises(ranks, name):
    for results in ranks:
        assert isinstance(results[name], str), results[name]
        assert results[name].startswith("RuntimeError: ")
        assert re.search(CASES[name][1], results[name].splitlines()[0]), results[name]


@pytest.mark.parametrize("name", AFTERWARDS)
def test_the_group_works_afterwards(ranks, name):
    assert [results[name] for results in ranks] == [AFTERWARDS[name][1]] * 2
