"""ALBEF as LAVIS saves and computes it, without token types; ViTs that are no plain ones."""

import copy
import json

import pytest
import timm
import torch
from fastvlp_tests.albef_cases import batch
from fastvlp_tests.albef_head_cases import fresh as fresh_head
from fastvlp_tests.albef_peer import CONFIG, PeerAlbef, bert_config, deit, perturb
from transformers import BertModel

from fastvlp.models.albef import Albef
from fastvlp.models.albef.tasks import classification as albef_classifier
from fastvlp.models.albef.tasks import vqa as albef_vqa
from fastvlp.models.checkpoints import load_any
from fastvlp.models.checkpoints.albef import TYPES, load_albef, load_bert, load_vit
from fastvlp.models.checkpoints.albef_heads import load_finetuned
from fastvlp.ops import momentum_contrastive

LAVIS = {
    "run": {"task": "image_text_pretrain"},
    "model": {"arch": "albef_pretrain"},
    "datasets": {},
}


class Words(torch.nn.Module):
    """BERT's embeddings with word and position alone: LN(word + position)."""

    def __init__(self, embeddings):
        super().__init__()
        self.word_embeddings = embeddings.word_embeddings
        self.position_embeddings = embeddings.position_embeddings
        self.LayerNorm = embeddings.LayerNorm

    def forward(self, input_ids):
        x = self.word_embeddings(input_ids) + self.position_embeddings.weight[: input_ids.shape[1]]
        return self.LayerNorm(x)


@pytest.fixture(scope="module")
def peers():
    """The authors' ALBEF, and the same weights in LAVIS' form."""
    authors = PeerAlbef()
    lavis = copy.deepcopy(authors)
    for side in (lavis.student, lavis.teacher):
        side.text_encoder.bert.embeddings = Words(side.text_encoder.bert.embeddings)
    return authors, lavis


def fresh():
    torch.manual_seed(5)
    return Albef(CONFIG).eval()


def types(model):
    return [v for k, v in model.state_dict().items() if k.endswith(TYPES)]


@torch.no_grad()
def test_losses_are_those_without_token_types(peers):
    model, peer = fresh(), peers[1]
    report = load_albef(model, peer.checkpoint())
    assert report.missing == ("momentum._extra_state",) and not report.unused
    assert any("no token types, as in LAVIS" in note for note in report.notes)
    assert len(types(model)) == 2 and not any(t.any() for t in types(model))
    images, ids, mask, masked, labels, alpha = batch(CONFIG)
    sides = [side.features(images, ids, mask)[2:] for side in (peer.student, peer.teacher)]
    contrast = momentum_contrastive(
        *sides[0], *sides[1], peer.image_queue.T, peer.text_queue.T, peer.temp, alpha, seed=3
    )
    wanted = peer.losses(
        images, ids, mask, masked, labels, alpha,
        (contrast.negative_texts, contrast.negative_images),
    )  # fmt: skip
    found = model.pretraining_loss(
        images, ids, mask, masked, labels, alpha, update=False, seed=3
    )  # fmt: skip
    for name, theirs in zip(("itc", "itm", "mlm"), wanted, strict=True):
        assert getattr(found, name).item() == pytest.approx(theirs.item(), rel=2e-6), name


def test_files_that_kept_the_unused_tensor_load_alike(peers, tmp_path):
    """LAVIS leaves it unused: known by its configuration in the file, or said by the caller."""
    wanted = fresh()
    load_albef(wanted, peers[1].checkpoint())
    torch.save({"model": peers[0].checkpoint(), "config": LAVIS}, tmp_path / "lavis.pth")
    for source, options in (
        (tmp_path / "lavis.pth", {}), (peers[0].checkpoint(), {"token_types": False}),
    ):  # fmt: skip
        model = fresh()
        load_albef(model, source, **options)
        found = model.state_dict()
        assert all(torch.equal(found[k], v) for k, v in wanted.state_dict().items())


def test_the_authors_token_types_are_added(peers, tmp_path):
    model = fresh()
    report = load_albef(model, peers[0].checkpoint())
    assert any("added to the words, as by the authors" in note for note in report.notes)
    own = peers[0].student.text_encoder.bert.embeddings.token_type_embeddings.weight
    assert torch.equal(types(model)[0], own)
    with pytest.raises(ValueError, match="token_type_embeddings"):
        load_albef(model, peers[1].checkpoint(), token_types=True)
    torch.save(peers[0].checkpoint(), tmp_path / "bare.pth")
    found, _ = load_any(tmp_path / "bare.pth", token_types=False)
    assert not types(found)[0].any()


@pytest.mark.parametrize("make", [albef_classifier.entailment, albef_vqa.create])
def test_fine_tuned_models_of_lavis(make):
    model, state = fresh_head(make), {}
    for name, value in model.student.state_dict().items():
        if not name.endswith("token_type_embeddings.weight"):
            state[name.replace("text_encoder.bert.", "text_encoder.")] = value + 0.5
    report = load_finetuned(model, {"model": state})
    towers = 2 if make is albef_vqa.create else 1
    assert len(types(model)) == 2 * towers and not any(t.any() for t in types(model))
    assert any("no token types" in note for note in report.notes)


def test_blip_is_not_taken_for_albef(tmp_path, peers):
    state = peers[1].checkpoint()
    for name in [name for name in state if ".crossattention." in name]:
        for number in (0, 1):
            state[name.replace("layer.2.", f"layer.{number}.")] = state[name]
    torch.save(state, tmp_path / "blip.pth")
    with pytest.raises(ValueError, match="^state: .*in 4 of 4, where BLIP has it in all"):
        load_any(tmp_path / "blip.pth")


def test_strict_false_is_proposed_for_heads_alone(peers):
    state = peers[0].checkpoint()
    del state["itm_head.bias"]
    with pytest.raises(ValueError, match="only itm_head.bias .* strict=False loads all the rest"):
        load_albef(fresh(), state)
    del state["vision_proj.bias"]
    with pytest.raises(ValueError, match="without student.vision_proj.bias") as caught:
        load_albef(fresh(), state)
    assert "strict" not in str(caught.value)


@torch.no_grad()
def test_a_distilled_deit_lends_all_but_its_second_token():
    tower = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=2)
    state = perturb(tower, 3).state_dict()
    model, plain = fresh(), perturb(deit(), 4)
    report = load_vit(model, state)
    assert set(report.unused) == {f"head{d}.{n}" for d in ("", "_dist") for n in ("weight", "bias")}
    assert any("distillation token" in note for note in report.notes)
    positions = torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 2:]], 1)
    plain.load_state_dict(
        {k: v for k, v in state.items() if "dist" not in k} | {"pos_embed": positions}
    )
    images = torch.randn(2, 3, 64, 64)
    expected = plain.forward_features(images)
    for encoder in (model.student, model.teacher):
        assert (encoder.encode_image(images) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name, what", [
    ("blocks.0.ls1.gamma", "layer scale, as DINOv2"), ("reg_token", "register tokens"),
    ("norm_pre.weight", "a norm before its blocks"), ("blocks.1.attn.q_norm.weight", "norms of"),
])  # fmt: skip
def test_vits_that_compute_otherwise_are_refused(name, what):
    state = deit().state_dict() | {name: torch.ones(1)}
    model = fresh()
    before = model.student.visual_encoder.norm.weight.clone()
    for strict in (True, False):
        with pytest.raises(ValueError, match=f"^source: the ViT has {what}") as caught:
            load_vit(model, state, strict=strict)
        assert "strict" not in str(caught.value)
    assert torch.equal(model.student.visual_encoder.norm.weight, before)


@pytest.mark.parametrize("change", [
    {"hidden_act": "relu"}, {"layer_norm_eps": 1e-5}, {"num_attention_heads": 6},
    {"position_embedding_type": "relative_key"}, {"model_type": "roberta"},
])  # fmt: skip
def test_a_bert_that_computes_otherwise_is_refused(tmp_path, change):
    peer = BertModel(bert_config(4))
    peer.save_pretrained(tmp_path)
    load_bert(fresh(), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=f"^source: expected {next(iter(change))} "):
        load_bert(fresh(), tmp_path)
