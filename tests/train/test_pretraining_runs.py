"""ViLT and ALBEF in the engine: what a run leaves, and how momentum encoder, chunks and scores
count."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fastvlp_tests import gloo_ranks
from fastvlp_tests.tiny_pretraining import ALBEF, TOKENIZER, VILT, build, fit, settings
from fastvlp_tests.tiny_run import weights

from fastvlp.evaluate.retrieval import retrieval_from_scores
from fastvlp.models import albef, base
from fastvlp.train import parallel, run
from fastvlp.train.config import TrainAlbef, TrainVilt, from_mapping
from fastvlp.train.logging import read_log
from fastvlp.train.presets import ALBEF_PAPER, VILT_PAPER
from fastvlp.train.tasks import albef_retrieval, vilt
from fastvlp.train.tasks.albef_setup import start_from_files
from fastvlp.train.tasks.data import split_pairs

pytestmark = pytest.mark.usefixtures("quick_runs")
SYSTEMS = ("vilt", "albef")


def ready(system, **changes):
    with parallel.ranks("cpu") as ranks:
        return build(settings(None, system, **changes), ranks)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_leaves_a_model_that_loads(tmp_path, system):
    scores, task = fit(tmp_path, system)
    model = base.load(tmp_path / "model")
    assert model.kind == system
    assert (tmp_path / "vocab.txt").read_text().split("\n")[:-1] == TOKENIZER.entries
    trained = task.model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    rows = [row for row in read_log(tmp_path) if "loss" in row]
    parts = [name for name in rows[0] if name.endswith("_loss")]
    assert len(parts) == 3
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row[name] for name in parts), rel=1e-5)
    assert all(0 <= value <= 1 for value in scores.values())
    if system == "vilt":
        names = ("accuracy", "accuracy_matched", "accuracy_mismatched", "loss")
        assert set(scores) == {f"held_out/matching/{name}" for name in names}
    else:
        assert len(scores) == 12
        assert model.momentum is None


@pytest.mark.parametrize("system", SYSTEMS)
def test_resuming_gives_the_weights_of_one_run(tmp_path, system):
    fit(tmp_path / "whole", system)
    config = settings(tmp_path / "two", system)
    with parallel.ranks("cpu") as ranks:
        task, loader = build(config, ranks)
        taken, after = 0, task.after_step

        def stop():
            nonlocal taken
            taken += 1
            if taken == 6:
                raise KeyboardInterrupt
            after()

        task.after_step = stop
        with pytest.raises(KeyboardInterrupt):
            run.fit(config, task, loader, ranks)
    fit(tmp_path / "two", system)
    whole, ours = weights(tmp_path / "whole"), weights(tmp_path / "two")
    assert [name for name in whole if not torch.equal(whole[name], ours[name])] == []


@pytest.mark.parametrize("system", SYSTEMS)
def test_kernels_and_plain_pytorch_have_one_curve(tmp_path, system, monkeypatch):
    # Dropout draws in another order where texts are padded.
    from dataclasses import replace

    from fastvlp_tests import tiny_pretraining

    monkeypatch.setattr(tiny_pretraining, "VILT", replace(VILT, dropout=0.0))
    monkeypatch.setattr(
        tiny_pretraining, "ALBEF", replace(ALBEF, dropout=0.0, attention_dropout=0.0)
    )
    curves = []
    for reference in (False, True):
        folder = tmp_path / str(reference)
        fit(folder, system, reference=reference, steps=6)
        curves.append([row["loss"] for row in read_log(folder) if "loss" in row])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def every_system(rank, folder):
    return {system: fit(folder / system, system)[0] for system in SYSTEMS}


def test_two_ranks_share_scores_and_queues_and_one_goes_on_from_there(tmp_path):
    found = gloo_ranks.run(2, every_system, tmp_path)
    assert isinstance(found[0], dict) and found[0] == found[1], found
    for system in SYSTEMS:
        _, task = fit(tmp_path / system, system, steps=9)
        assert len(read_log(tmp_path / system)) == 11  # nine steps, two evaluations
    assert task.momentum.num_updates == 9
    assert int(task.model.queue.position) == 9 * 8 % ALBEF.queue_size


def test_the_momentum_encoder_moves_in_the_optimiser_as_the_paper_has_it():
    task, loader = ready("albef")
    other, _ = ready("albef")
    from fastvlp.optim import AdamWEma

    def parameters(model):
        return [p for p in model.parameters() if p.requires_grad]

    fused = AdamWEma(parameters(task.model), lr=1e-2, ema=task.momentum)
    apart = AdamWEma(parameters(other.model), lr=1e-2)
    for batch in [batch for batch in loader][:3]:
        for each, optimizer in ((task, fused), (other, apart)):
            torch.manual_seed(0)
            if each is other:
                # The paper moves the momentum encoder in the step's forward pass; the first move is
                # none.
                text = batch.tokens
                moved = each.model.momentum.num_updates
                alpha = each.alpha * min(1.0, moved / each.alpha_steps)
                each.model(
                    batch.images, text.ids, text.mask, text.masked_ids, text.labels, alpha,
                    ids=batch.ids,
                ).total.backward()  # fmt: skip
            else:
                each.backward(each.model, batch)
            optimizer.step()
            if each is task:
                task.after_step()
            optimizer.zero_grad()
    for ours, theirs in zip(task.model.parameters(), other.model.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours, theirs)


def test_alpha_rises_with_the_steps_that_were_taken():
    task, _ = ready("albef")
    seen = []
    for _ in range(7):
        seen.append(task.present_alpha())
        task.momentum.num_updates += 1
    assert seen == pytest.approx([0, 0.08, 0.16, 0.24, 0.32, 0.4, 0.4])


@pytest.mark.parametrize("system", SYSTEMS)
def test_chunks_cover_the_batch(system):
    task, loader = ready(system)
    batch = next(iter(loader))
    parts = list(split_pairs(batch, 3))
    assert [len(part) for part, _ in parts] == [3, 3, 2]
    assert sum(weight for _, weight in parts) == pytest.approx(1)
    assert torch.equal(torch.cat([part.tokens.labels for part, _ in parts]), batch.tokens.labels)
    assert torch.equal(torch.cat([part.images for part, _ in parts]), batch.images)
    task.chunk_size = 3
    losses = task.backward(task.model, batch)
    assert losses["loss"].isfinite()
    if system == "albef":
        assert int(task.model.queue.position) == 0
        task.after_step()
        assert int(task.model.queue.position) == len(batch)


def test_wrong_images_are_of_other_ids():
    ids = torch.tensor([0, 2, 1, 0])
    sampled = [vilt.partners(ids, torch.Generator().manual_seed(seed)) for seed in range(50)]
    assert all((ids[partner] != ids).all() for partner in sampled)
    # Every other one is chosen.
    assert [set(column.tolist()) for column in torch.stack(sampled, 1)] == [
        {1, 2}, {0, 2, 3}, {0, 1, 3}, {1, 2}
    ]  # fmt: skip
    assert vilt.partners(torch.tensor([3, 3])).tolist() == [-1, -1]
    assert vilt.partners(torch.tensor([3])).tolist() == [-1]


def test_matching_accuracy_counts_both_kinds():
    task, _ = ready("vilt")
    model, loader = task.model.eval(), task.held_out["held_out"]
    for bias, expected in (((0.0, 50.0), (0.5, 1.0, 0.0)), ((50.0, 0.0), (0.5, 0.0, 1.0))):
        with torch.no_grad():
            model.itm_score["fc"].bias.copy_(torch.tensor(bias))
        found = vilt.matching_accuracy(model, TOKENIZER, loader, task.ranks)
        *shares, loss = found.values()
        assert tuple(shares) == expected
        # Half of the judgements are wrong by about the difference of the biases, the others right.
        assert loss == pytest.approx(25, abs=2)


def test_matching_accuracy_does_not_depend_on_batches():
    found = []
    for batch_size in (4, 16):
        task, _ = ready("vilt", batch_size=batch_size)
        found.append(task.evaluate(task.model.eval()))
    losses = [scores.pop("held_out/matching/loss") for scores in found]
    assert found[0] == found[1] and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_reranking_ranks_by_the_matching_head():
    task, _ = ready("albef")
    model, loader = task.model.eval(), task.held_out["held_out"]
    found = albef_retrieval.retrieval_scores(model, TOKENIZER, loader, 40, task.ranks)
    # By definition: every caption with every image, fused in the padded form.
    pairs = loader.samples
    images = loader._images.float() / 127.5 - 1
    text = TOKENIZER.padded(loader.captions)
    student = model.student
    with torch.no_grad():
        tokens = student.encode_padded(text.ids, text.mask)
        encoded = student.encode_image(images)
        table = torch.stack(
            [
                model.itm_head(
                    student.fuse_padded(tokens, text.mask, one.expand(pairs, -1, -1))[:, 0]
                )[:, 1]
                for one in encoded
            ],
            1,
        )
    for way, ranked in retrieval_from_scores(table, table.T).items():
        for name in ("R@1", "R@5", "R@10"):
            assert found[f"reranked/{way}/{name}"] == ranked[name]
    # A single candidate for each query is the one that contrast ranks first.
    few = albef_retrieval.retrieval_scores(model, TOKENIZER, loader, 1, task.ranks)
    for way in ("text_to_image", "image_to_text"):
        assert few[f"reranked/{way}/R@1"] == few[f"{way}/R@1"]


class Shared:
    """Held-out pairs of images that have one to three captions, the pairs of an image apart.

    broken: pairs whose image cannot be decoded. removed: pairs that the data have not.
    """

    batch_size = 4

    def __init__(self, rank=0, world_size=1, broken=(), removed=()):
        self.rank, self.world_size, self.broken = rank, world_size, torch.tensor(broken)
        left = torch.tensor([i for i in range(10) if i not in removed])
        self.ids = torch.tensor([5, 2, 9, 5, 7, 2, 5, 8, 11, 7])[left]
        self.captions = [str(i) for i in left.tolist()]
        images = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        self.images = images[self.ids]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state["epoch"] == 0

    def __iter__(self):
        for rows in torch.arange(len(self.ids)).split(self.batch_size * self.world_size):
            rows = rows.tensor_split(self.world_size)[self.rank]
            rows = rows[~torch.isin(rows, self.broken)]
            captions = [self.captions[i] for i in rows]
            yield SimpleNamespace(
                images=self.images[rows], ids=self.ids[rows], index=rows, captions=captions,
                tokens=TOKENIZER.padded(captions), pixel_mask=None,
            )  # fmt: skip


def shared_scores(rank, candidates, broken=(), removed=()):
    with parallel.ranks("cpu") as ranks:
        task, _ = build(settings(None, "albef"), ranks)
        loader = Shared(ranks.rank, ranks.world_size, broken, removed)
        model = task.model.eval()
        return albef_retrieval.retrieval_scores(model, TOKENIZER, loader, candidates, ranks)


@pytest.mark.parametrize("candidates", [1, 3])
def test_reranking_ranks_each_direction_by_its_own_candidates(candidates):
    task, _ = ready("albef")
    model, loader = task.model.eval(), Shared()
    student, text = model.student, TOKENIZER.padded(Shared().captions)
    names, image_of_text = loader.ids.unique(return_inverse=True)
    shown = torch.stack([loader.images[loader.ids == name][0] for name in names])
    with torch.no_grad():
        encoded, words = student.encode_image(shown), student.encode_padded(text.ids, text.mask)
        similarity = student.text_features(words[:, 0]) @ student.image_features(encoded).T
        fused = [
            student.fuse_padded(words, text.mask, one.expand(len(words), -1, -1))[:, 0]
            for one in encoded
        ]
        table = torch.stack([model.itm_head(each)[:, 1] for each in fused], 1)

    def of_candidates(scores, matching):
        chosen = scores.topk(candidates, 1).indices
        low = torch.full_like(matching, -torch.inf)
        return low.scatter(1, chosen, matching.gather(1, chosen))

    directions = of_candidates(similarity, table), of_candidates(similarity.T, table.T)
    found = shared_scores(0, candidates)
    for way, ranked in retrieval_from_scores(*directions, image_of_text).items():
        for name in ("R@1", "R@5", "R@10"):
            assert found[f"reranked/{way}/{name}"] == ranked[name]


# Pairs without an image: none, the first one of an image, and all that the second rank has.
BROKEN = [(), (0,), (4, 5, 6, 7, 9)]


def test_ranks_rerank_what_one_reranks():
    jobs = {broken: (shared_scores, 2, broken) for broken in BROKEN}
    jobs["all"] = (shared_scores, 2, tuple(range(10)))
    found = gloo_ranks.run(2, gloo_ranks.several, jobs)
    for broken in BROKEN:
        alone = shared_scores(0, 2, removed=broken)
        for results in found:
            assert results[broken] == pytest.approx(alone), results
    assert all("expected at least one pair" in results["all"] for results in found)


@pytest.mark.parametrize("broken", BROKEN)
def test_pairs_without_an_image_are_left_out_of_retrieval(broken):
    found = shared_scores(0, 2, broken)
    assert found == pytest.approx(shared_scores(0, 2, removed=broken))


@pytest.mark.parametrize("broken", BROKEN)
def test_pairs_without_an_image_are_left_out_of_matching(broken):
    found = []
    for given in ({"broken": broken}, {"removed": broken}):
        task, _ = ready("vilt")
        model = task.model.eval()
        found.append(vilt.matching_accuracy(model, TOKENIZER, Shared(**given), task.ranks))
    assert found[0] == pytest.approx(found[1])
    with pytest.raises(ValueError, match="expected at least one pair to judge"):
        vilt.matching_accuracy(model, TOKENIZER, Shared(broken=tuple(range(10))), task.ranks)


@pytest.mark.parametrize("reference", [False, True])
def test_reranking_in_low_precision_ranks_alike(reference):
    task, _ = ready("albef", reference=reference)
    with torch.autocast("cpu", torch.bfloat16):
        found = albef_retrieval.retrieval_scores(
            task.model.eval(), TOKENIZER, Shared(), 3, task.ranks
        )
    assert all(0 <= value for value in found.values()) and "reranked/text_to_image/R@5" in found


def test_towers_start_from_given_files(tmp_path):
    donor, model = albef.Albef(ALBEF), albef.Albef(ALBEF)
    for name in ("visual_encoder", "text_encoder"):
        torch.save(getattr(donor.student, name).state_dict(), tmp_path / f"{name}.pt")
    config = settings(
        None,
        "albef",
        vision_weights=tmp_path / "visual_encoder.pt",
        text_weights=tmp_path / "text_encoder.pt",
    )
    start_from_files(model, config)
    for name, value in model.momentum.module.state_dict().items():
        wanted = donor if "_encoder." in name else model
        assert torch.equal(value, wanted.student.state_dict()[name]), name


def test_decay_is_as_published():
    task, _ = ready("albef")
    named = dict(task.model.named_parameters())
    assert task.uses_weight_decay("temp", named["temp"])
    assert task.uses_weight_decay("", named["student.visual_encoder.cls_token"])
    assert not task.uses_weight_decay("", named["student.visual_encoder.norm.weight"])


def test_papers_settings_and_what_is_refused():
    found = from_mapping(TrainAlbef, ALBEF_PAPER, "paper")
    assert (found.batch_size, found.weight_decay, found.match_ids) == (512, 0.02, False)
    assert found.mask_rate == 0.15
    found = from_mapping(TrainVilt, VILT_PAPER, "paper")
    assert (found.batch_size, found.betas, found.warmup) == (4096, (0.9, 0.98), 10_000)
    for name, value in {"ema": 0.9, "parallel": "fsdp", "alpha": 2.0}.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            TrainAlbef(**{name: value})


@pytest.mark.parametrize("system", SYSTEMS)
def test_commands_train_and_evaluate_on_openmoji(tmp_path, monkeypatch, system):
    from fastvlp.commands import evaluate
    from fastvlp.commands import train as command
    from fastvlp.data import openmoji

    monkeypatch.setattr(openmoji, "build", partial(openmoji.build, limit=24))
    options = ["--steps", "1", "--batch-size", "8", "--precision", "float32", "--no-progress"]
    scores = command.parse([system, "--folder", str(tmp_path), *options]).run()
    if system == "vilt":
        found = evaluate.parse(["matching", str(tmp_path), "--batch-size", "8"]).run()
        assert found["matching/accuracy"] == scores["composition/matching/accuracy"]
        with pytest.raises(
            ValueError,
            match="model: expected one of clip, albef or albef-retrieval, got one of vilt",
        ):
            evaluate.parse(["retrieval", str(tmp_path)]).run()
    else:
        found = evaluate.parse(["retrieval", str(tmp_path)]).run()
        for name in ("text_to_image R@10", "reranked image_to_text R@1"):
            assert found[name] == pytest.approx(scores[f"composition/{name.replace(' ', '/')}"])
