"""Steps in which a rank, or every rank, has no pairs, because no image of its could be decoded."""

import json

import pytest
import torch
from fastvlp_tests import gloo_ranks, photo_shards, tiny_pretraining, tiny_run
from fastvlp_tests.tiny_run import Regression
from fastvlp_tests.tiny_vocabularies import bert_vocabulary

from fastvlp.commands import train as command
from fastvlp.train import parallel
from fastvlp.train.logging import read_log
from fastvlp.train.loop import Loop
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks.data import split_pairs

ALONE = Ranks(0, 1, torch.device("cpu"), None)
PAIRS = 5
# System, wrapper and chunk size.
KINDS = [
    ("clip", "ddp", None), ("clip", "fsdp", None), ("clip", "fsdp", 2), ("vilt", "ddp", 2),
    ("vilt", "fsdp", 2), ("albef", "ddp", None), ("albef", "ddp", 2),
]  # fmt: skip


def build(system, ranks, chunk_size):
    if system == "clip":
        config = tiny_run.settings(None, chunk_size=chunk_size)
        return tiny_run.build(config, ranks, tiny_run.PlainTask)
    config = tiny_pretraining.settings(None, system, chunk_size=chunk_size)
    return tiny_pretraining.build(config, ranks)


def make(system, wrapper, chunk_size, ranks):
    """A loop over a model on the ranks; its optimiser keeps gradients and changes nothing."""
    task, _ = build(system, ranks, chunk_size)
    model = task.model
    if wrapper == "fsdp" and ranks.group is not None:
        parallel.recompute(task.blocks())
        model = parallel.shard(model, task.blocks(), task.forward_methods)
    else:
        model = parallel.replicate(model, ranks)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=1.0)
    loop = Loop(task, model, None, optimizer, lambda s: 1.0, steps=2, group=ranks.group)
    loop.gradients = {}

    def keep():
        for name, p in task.model.named_parameters():
            if p.grad is not None:
                whole = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                loop.gradients[name] = whole.clone()

    optimizer.step = keep
    loop.model.train()
    return loop


def stepped(loop, batch):
    """Of one step: the report, the gradients and, for ALBEF, the queue."""
    torch.manual_seed(0)  # of dropout, matches and negatives
    report = loop.train_step(batch)
    queue = loop.task.model.queue.state_dict() if hasattr(loop.task.model, "queue") else {}
    return report.taken, report.pairs, report.losses, loop.gradients, queue


def one_kind(rank, kind):
    """A step of five pairs and none, the same in one process, and a step without any."""
    system, wrapper, chunk_size = kind
    with parallel.ranks("cpu") as ranks:
        whole = next(iter(build(system, ALONE, None)[1]))
        some, none = next(split_pairs(whole, PAIRS))[0], list(split_pairs(whole, 8, 2))[1][0]
        loop = make(*kind, ranks)
        found = stepped(loop, none if rank == 0 else some)
        loop.gradients = {}
        nothing = stepped(loop, none)
        alone = stepped(make(*kind, ALONE), some)
    return found, nothing, alone, loop.empty


def sample(number):
    """Images 1 and 5 look whole and cannot be decoded."""
    if number % 4 == 1:
        return photo_shards.good(number, jpg=photo_shards.undecodable(number))
    return photo_shards.good(number)


def one_pair_a_rank(rank, folder):
    options = [
        "--folder", str(folder / "run"), "--data", str(folder / "*.tar"), "--eval-data",
        str(folder / "*.tar"), "--tokenizer", str(folder / "vocab.txt"), "--batch-size", "2",
        "--steps", "4", "--max-broken", "1", "--save-every", "4", "--model", "tiny",
        "--no-progress", "--precision", "float32", "--device", "cpu", "--log-every", "1",
    ]  # fmt: skip
    return command.parse(["albef", *options]).run()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    photo_shards.write(folder, 8, sample=sample)
    bert_vocabulary(folder, ["caption", *"01234567"])
    jobs = {kind: (one_kind, kind) for kind in KINDS}
    jobs["run"] = (one_pair_a_rank, folder)
    return folder, gloo_ranks.run(2, gloo_ranks.several, jobs)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_rank_without_pairs_adds_nothing(ranks, kind):
    found = [results[kind] for results in ranks[1]]
    assert all(isinstance(each, tuple) for each in found), found
    losses = [step[2] for step, *_ in found]
    for (taken, pairs, _, gradients, queue), _, alone, _ in found:
        assert taken and pairs == PAIRS
        assert gradients.keys() == alone[3].keys()
        for name, gradient in alone[3].items():
            torch.testing.assert_close(gradients[name], gradient, msg=f"{name}")
        assert queue.keys() == alone[4].keys()
        for name, value in alone[4].items():
            torch.testing.assert_close(queue[name], value, msg=name)
        # What the log makes of the losses: their mean over the ranks.
        assert losses[0].keys() == losses[1].keys() == alone[2].keys()
        for name, loss in alone[2].items():
            torch.testing.assert_close((losses[0][name] + losses[1][name]) / 2, loss, msg=name)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_without_pairs_on_any_rank_a_step_is_left_out(ranks, kind):
    for (*_, before), (taken, pairs, losses, gradients, queue), _, empty in (
        results[kind] for results in ranks[1]
    ):
        assert (taken, pairs, losses, gradients, empty) == (False, 0, {}, {}, 1)
        assert all(torch.equal(value, before[name]) for name, value in queue.items())


def test_a_run_of_one_pair_a_rank_ends(ranks):
    """Two of eight images cannot be decoded, in training and in evaluation."""
    folder, found = ranks
    scores = [results["run"] for results in found]
    assert isinstance(scores[0], dict) and scores[0] == scores[1], scores
    assert all(0 <= value <= 1 for value in scores[0].values())
    assert (folder / "run" / "model.safetensors").exists()
    rows = [row for row in read_log(folder / "run") if "lr" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    # Shuffled, the two may have met in one step, which then has no loss.
    missing = [row for row in rows if "loss" not in row]
    assert len(missing) == rows[-1].get("steps_without_pairs", 0)
    assert all(row["loss"] > 0 for row in rows if "loss" in row)
    assert json.loads((folder / "run" / "model.json").read_text())["kind"] == "albef"


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("sizes", [(3, 7), (0, 10), (9, 1)])
def test_unequal_ranks_average_to_the_mean_over_all_rows(sizes, chunk_size):
    batch = torch.randn(10, 3, dtype=torch.float64)
    whole = Regression()
    wanted = whole.backward(whole.model, batch)
    found = []
    for part in batch.split(sizes):
        task = Regression(chunk_size)
        losses = task.backward(task.model, part, sizes=sizes)
        found.append((losses["loss"], *(p.grad for p in task.model.parameters())))
    exact = wanted["loss"], *(p.grad for p in whole.model.parameters())
    for *each, right in zip(*found, exact, strict=True):
        torch.testing.assert_close(sum(each) / 2, right)
