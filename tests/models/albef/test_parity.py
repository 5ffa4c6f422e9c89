"""A step of ALBEF put together from timm's DeiT and transformers' BERT; loading of checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from fastvlp_tests.albef_cases import batch
from fastvlp_tests.albef_peer import CONFIG, QUEUE, PeerAlbef, bert_config, deit, perturb
from safetensors.torch import save_file
from transformers import BertForMaskedLM, BertForPreTraining, BertModel

from fastvlp.models.albef import Albef
from fastvlp.models.checkpoints.albef import load_albef, load_bert, load_vit
from fastvlp.ops import momentum_contrastive


def fresh(seed=5, **overrides):
    torch.manual_seed(seed)
    config = CONFIG if not overrides else type(CONFIG)(**(CONFIG.__dict__ | overrides))
    return Albef(config).eval()


@pytest.fixture(scope="module")
def peer():
    return PeerAlbef()


def near(name, found, wanted, relative=1e-5):
    error = (found - wanted).norm() / wanted.norm()
    assert error <= relative, f"{name}: {error:.2e}"


@pytest.mark.parametrize("reference", [False, True])
@torch.no_grad()
def test_features_and_losses_agree_with_the_assembly(peer, reference):
    model = fresh()
    report = load_albef(model, peer.checkpoint())
    assert not report.unused and report.missing == ("momentum._extra_state",)
    assert model.queue.position == 8
    model.use_reference(reference)
    images, ids, mask, masked, labels, alpha = batch(CONFIG)
    sides = {}
    for name, ours, theirs in (
        ("student", model.student, peer.student),
        ("teacher", model.teacher, peer.teacher),
    ):
        tokens, texts, image, text = theirs.features(images, ids, mask)
        near(f"{name} image", ours.image_features(ours.encode_image(images)), image)
        near(f"{name} tokens", ours.encode_image(images), tokens)
        found = ours.encode_padded(ids, mask)
        near(f"{name} texts", found[mask], texts[mask])
        near(f"{name} text", ours.text_features(found[:, 0]), text)
        sides[name] = image, text
    contrast = momentum_contrastive(
        *sides["student"], *sides["teacher"], peer.image_queue.T, peer.text_queue.T, peer.temp,
        alpha, seed=3,
    )  # fmt: skip
    negatives = contrast.negative_texts, contrast.negative_images
    assert all((n != torch.arange(4)).all() for n in negatives)
    wanted = peer.losses(images, ids, mask, masked, labels, alpha, negatives)
    found = model.pretraining_loss(
        images, ids, mask, masked, labels, alpha, update=False, seed=3
    )  # fmt: skip
    for name, theirs in zip(("itc", "itm", "mlm"), wanted, strict=True):
        near(name, getattr(found, name), theirs)
    near("total", found.total, sum(wanted))


def test_files_and_containers(peer, tmp_path):
    state = {k: v.clone() for k, v in peer.checkpoint().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "albef.pth")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "albef.safetensors")
    models = [fresh(), fresh(6)]
    for model, name in zip(models, ("albef.pth", "albef.safetensors"), strict=True):
        load_albef(model, tmp_path / name)
    ours, theirs = (m.state_dict() for m in models)
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())
    assert torch.equal(ours["queue.image_queue"], state["image_queue"].T)


def test_the_momentum_encoder_and_its_copy_are_loaded_or_made(peer):
    """LAVIS saves no momentum encoder; a copy in low precision follows whatever the momentum
    encoder becomes."""
    for state, side in (
        (peer.checkpoint(), peer.teacher),
        ({k: v for k, v in peer.checkpoint().items() if "_m." not in k}, peer.student),
    ):
        model = fresh(momentum_copy="bfloat16")
        report = load_albef(model, state)
        assert any("no momentum encoder" in note for note in report.notes) == (side is peer.student)
        wanted = side.vision_proj.weight
        assert torch.equal(model.momentum.module.vision_proj.weight, wanted)
        assert torch.equal(model.momentum.copy.vision_proj.weight, wanted.bfloat16())


def test_fine_tuned_names_without_vocabulary_head(peer):
    state = {
        k.replace("text_encoder.bert.", "text_encoder.").replace("encoder_m.bert.", "encoder_m."): v
        for k, v in peer.checkpoint().items()
        if ".cls." not in k
    }
    state["idx_queue"] = torch.arange(QUEUE)[None]
    model = fresh(queue_ids=True)
    head = model.student.text_encoder.predictions.bias.clone()
    report = load_albef(model, state)
    assert any("vocabulary head" in note for note in report.notes)
    assert torch.equal(model.student.text_encoder.predictions.bias, head)
    assert torch.equal(model.queue.queue_ids, torch.arange(QUEUE))
    query = model.student.text_encoder.fusion[0].crossattention.self.query.weight
    layer = peer.student.text_encoder.bert.encoder.layer[2]
    assert torch.equal(query, layer.crossattention.self.query.weight)


def resized(positions, side):
    grid = positions[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def test_positions_of_both_are_resized_and_other_queues_left(peer):
    model = fresh(image_size=96, queue_size=16)
    queue = model.queue.image_queue.clone()
    report = load_albef(model, peer.checkpoint())
    names = [name for name, *_ in report.reshaped]
    assert names == [f"{p}.visual_encoder.pos_embed" for p in ("student", "momentum.module")]
    for ours, theirs in (
        (model.student, peer.student), (model.momentum.module, peer.teacher),
    ):  # fmt: skip
        wanted = resized(theirs.visual_encoder.pos_embed, 6)
        torch.testing.assert_close(ours.visual_encoder.pos_embed, wanted)
    assert torch.equal(model.queue.image_queue, queue)
    assert any("queues of 32 pairs for 16" in note for note in report.notes)


def test_a_model_for_fine_tuning_leaves_out_momentum_encoder_and_queues(peer):
    model = fresh(pretraining=False)
    report = load_albef(model, peer.checkpoint())
    assert not report.missing and all(name.startswith("momentum.") for name in report.unused)


def test_what_does_not_fit_is_refused_and_nothing_written(peer):
    model = fresh()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = peer.checkpoint()
    del state["itm_head.bias"]
    with pytest.raises(ValueError, match="itm_head.bias"):
        load_albef(model, state)
    with pytest.raises(ValueError, match="surprise"):
        load_albef(model, peer.checkpoint() | {"surprise": torch.ones(1)})
    untied = torch.zeros(300, 192)
    with pytest.raises(ValueError, match="one matrix"):
        load_albef(
            model, peer.checkpoint() | {"text_encoder.cls.predictions.decoder.weight": untied}
        )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert load_albef(model, state, strict=False).missing[0] == "itm_head.bias"


@torch.no_grad()
def test_vit_of_another_resolution_with_its_classifier():
    tower = perturb(deit(), 3)
    model = fresh(image_size=96)
    report = load_vit(model, tower.state_dict())
    assert report.reshaped and set(report.unused) == {"head.weight", "head.bias"}
    large = perturb(deit(96), 3)
    large.load_state_dict(tower.state_dict() | {"pos_embed": resized(tower.pos_embed, 6)})
    images = torch.randn(2, 3, 96, 96)
    near("tokens", model.student.encode_image(images), large.forward_features(images))
    near("momentum encoder", model.teacher.encode_image(images), large.forward_features(images))


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForPreTraining])
@torch.no_grad()
def test_bert(kind):
    peer = perturb(kind(bert_config(4)), 4)
    model = fresh()
    report = load_bert(model, peer.state_dict())
    assert all("crossattention" in n or kind is BertModel for n in report.missing)
    encoder = model.student.text_encoder
    ids, mask = batch(CONFIG)[1:3]
    x = model.student.encode_padded(ids, mask)
    # BERT's last layers have no cross-attention: without its share they are text layers.
    for layer in encoder.fusion:
        layer.crossattention = None
        x = layer.padded(x, mask)
    wanted = getattr(peer, "bert", peer)(ids, mask)[0]
    near("hidden", x[mask], wanted[mask])
    average = model.momentum.module.text_encoder.embeddings.word_embeddings.weight
    assert torch.equal(average, encoder.embeddings.word_embeddings.weight)


def test_bert_with_old_names():
    peer = perturb(BertModel(bert_config(4)), 4)
    state = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in peer.state_dict().items()
    }
    model = fresh()
    load_bert(model, {f"bert.{k}": v for k, v in state.items()})
    norm = model.student.text_encoder.fusion[1].output.LayerNorm.weight
    assert torch.equal(norm, peer.encoder.layer[3].output.LayerNorm.weight)
