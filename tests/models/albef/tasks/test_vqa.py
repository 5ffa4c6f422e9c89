"""ALBEF's answers: the decoder's loss and ranking against the plain form and transformers."""

import pytest
import torch
import torch.nn.functional as F
from fastvlp_tests.albef_head_cases import (
    LENGTHS,
    assert_forms_agree,
    assert_saved_and_loaded,
    disturb,
    fresh,
    make_images,
    sentences,
)
from transformers import BertConfig, BertLMHeadModel, BertModel
from transformers.models.bert.modeling_bert import BertLayer

from fastvlp.models.albef.tasks import vqa as albef_vqa

ANSWER_LENGTHS = [5, 3, 2, 4, 5, 3, 4, 2]
QUESTION = [0, 2, 1, 0, 3, 3, 1, 2]
WEIGHTS = torch.tensor([0.3, 1.0, 0.5, 0.7, 0.2, 0.8, 0.5, 0.1])


def make(**overrides):
    return disturb(fresh(albef_vqa.create, **overrides))


def answers():
    ids = sentences(8, 5, seed=3)
    ids[:, 0] = 1
    return ids, ANSWER_LENGTHS


def batch():
    return make_images(4), sentences(4, 9), LENGTHS, *answers(), QUESTION, WEIGHTS


def test_forms_agree():
    images, *rest = batch()

    def loss(images):
        return lambda model: model.loss(images, *rest, 0.3, update=False)

    assert_forms_agree(make(), loss(images), loss(images.double()))


def hf_config(**kwargs):
    return BertConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
        max_position_embeddings=64,
        attn_implementation="eager",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **kwargs,
    )


def padding(mask):
    return (~mask[:, None, None]) * torch.finfo(torch.float32).min


class Peer:
    """The same weights in transformers' classes, padded texts, a question for each answer."""

    def __init__(self, network):
        self.network = network
        encoder = network.text_encoder
        self.text = BertModel(hf_config(), add_pooling_layer=False).eval()
        state = {f"embeddings.{k}": v for k, v in encoder.embeddings.state_dict().items()}
        for i, layer in enumerate(encoder.text):
            state |= {f"encoder.layer.{i}.{k}": v for k, v in layer.state_dict().items()}
        load(self.text, state)
        fusing = hf_config(is_decoder=True, add_cross_attention=True)
        self.fusion = [BertLayer(fusing).eval() for _ in encoder.fusion]
        for theirs, ours in zip(self.fusion, encoder.fusion, strict=True):
            theirs.load_state_dict(ours.state_dict())
        self.decoder = BertLMHeadModel(fusing).eval()
        state = network.text_decoder.state_dict()
        load(self.decoder, state | {"cls.predictions.decoder.bias": state["cls.predictions.bias"]})

    def question(self, images, ids, mask):
        tokens = self.network.encode_image(images)
        x = self.text(ids, mask.long()).last_hidden_state
        for layer in self.fusion:
            x = layer(x, padding(mask), encoder_hidden_states=tokens)
        return x

    def log_probs(self, ids, mask, question, question_mask):
        logits = self.decoder(
            ids,
            attention_mask=mask.long(),
            encoder_hidden_states=question,
            encoder_attention_mask=question_mask.long(),
        ).logits
        return logits.log_softmax(-1)

    def losses(self, images, ids, mask, answer_ids, answer_mask, owner):
        """Sum of -log p of each answer's tokens, and the log-probabilities."""
        states = self.question(images, ids, mask)[owner]
        found = self.log_probs(answer_ids, answer_mask, states, mask[owner])
        chosen = found[:, :-1].gather(2, answer_ids[:, 1:, None])[..., 0]
        return -(chosen * answer_mask[:, 1:]).sum(1), found


def load(theirs, state):
    result = theirs.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all("position_ids" in name for name in result.missing_keys)


def mask_of(lengths, length):
    return torch.arange(length) < torch.tensor(lengths)[:, None]


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_the_loss_agrees_with_transformers(alpha):
    model = make().eval()
    images, ids, lengths, answer_ids, answer_lengths, question, weights = batch()
    owner = torch.tensor(question)
    mask, answer_mask = mask_of(lengths, 9), mask_of(answer_lengths, 5)
    arguments = images, ids, mask, answer_ids, answer_mask, owner
    hard, student = Peer(model.student).losses(*arguments)
    _, teacher = Peer(model.teacher).losses(*arguments)
    soft = -(teacher.exp() * student).sum(-1)[:, :-1]
    soft = (soft * answer_mask[:, 1:]).sum(1)
    wanted = (weights * ((1 - alpha) * hard + alpha * soft)).sum() / 4
    found = model.loss(*batch(), alpha, update=False)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@torch.no_grad()
def test_the_ranking_agrees_with_transformers():
    model, k = make(distill=False).eval(), 5
    images, ids, lengths = batch()[:3]
    answer_ids, answer_lengths = answers()
    mask, answer_mask = mask_of(lengths, 9), mask_of(answer_lengths, 5)
    peer = Peer(model.student)
    states = peer.question(images, ids, mask)
    start = torch.ones(4, 1, dtype=torch.int64)
    first = peer.log_probs(start, start.bool(), states, mask)[:, 0][:, answer_ids[:, 1]]
    first, chosen = first.topk(k)
    pairs = chosen.flatten()
    whole, _ = peer.losses(
        images,
        ids,
        mask,
        answer_ids[pairs],
        answer_mask[pairs],
        torch.arange(4).repeat_interleave(k),
    )
    # One question at a time, two, all four.
    for twice, workspace in ((False, 1), (True, 12 * 64 * 4 * 40), (False, 1 << 28)):
        wanted = -whole.view(4, k) + (first if twice else 0)
        found = model.rank_answers(
            images, ids, lengths, *answers(), k, count_first_twice=twice, workspace_bytes=workspace
        )
        order = wanted.argsort(1, descending=True)
        assert torch.equal(found.answers, chosen.gather(1, order))
        torch.testing.assert_close(found.log_probs, wanted.gather(1, order), rtol=1e-5, atol=0)


def test_the_plain_form_ranks_alike():
    model = make(distill=False).eval()
    given = (*batch()[:3], *answers())
    loss, ours = model.loss(*batch()), model.rank_answers(*given, k=100)
    model.use_reference()
    torch.testing.assert_close(model.loss(*batch()), loss, rtol=1e-5, atol=0)
    plain = model.rank_answers(*given, k=100)
    assert ours.answers.shape == (4, 8) and torch.equal(ours.answers, plain.answers)
    torch.testing.assert_close(ours.log_probs, plain.log_probs, rtol=1e-5, atol=0)


def test_a_ranked_answer_has_the_probability_that_the_loss_says():
    model = make(distill=False).eval()
    images, ids, lengths = (t[:1] for t in batch()[:3])
    found = model.rank_answers(images, ids, lengths, *answers(), k=8)
    for answer, log_prob in zip(found.answers[0], found.log_probs[0], strict=True):
        one = slice(int(answer), int(answer) + 1)
        text = answers()[0][one], answers()[1][one]
        loss = model.loss(images, ids, lengths, *text, [0], torch.ones(1))
        torch.testing.assert_close(loss, -log_prob, rtol=1e-5, atol=0)


def test_the_decoder_starts_from_the_fusion_layers():
    network = albef_vqa.create("tiny").student
    for ours, theirs in zip(
        network.text_decoder.bert["encoder"]["layer"], network.text_encoder.fusion, strict=True
    ):
        wanted = theirs.state_dict()
        assert all(torch.equal(v, wanted[k]) for k, v in ours.state_dict().items())
    # Images of another width: all but the keys and values of images.
    network = albef_vqa.create("tiny", vision_width=32).student
    first, fused = network.text_decoder.bert["encoder"]["layer"][0], network.text_encoder.fusion[0]
    assert torch.equal(first.intermediate["dense"].weight, fused.intermediate["dense"].weight)
    assert first.crossattention.self.key.weight.shape == (64, 64)


def test_questions_are_projected_once_for_all_answers():
    model = make(distill=False)
    rows = []
    for layer in model.student.text_decoder.bert["encoder"]["layer"]:
        layer.crossattention.self.key.register_forward_hook(
            lambda _, arguments, __: rows.append(len(arguments[0]))
        )
    model.loss(*batch())
    assert rows == [sum(LENGTHS)] * 2


def test_padding_and_an_answer_without_weight_have_no_effect():
    model, given = make().eval(), list(batch())
    wanted = model.loss(*given, update=False)
    wide = F.pad(given[3], (0, 3), value=7)
    given[3] = torch.cat([wide, wide[:1]])
    given[4], given[5] = [*given[4], 5], [*given[5], 2]
    given[6] = F.pad(given[6], (0, 1))
    torch.testing.assert_close(model.loss(*given, update=False), wanted, rtol=1e-6, atol=0)


def test_save_and_load(tmp_path):
    assert_saved_and_loaded(
        make(), tmp_path, albef_vqa.load, lambda m: m.loss(*batch(), update=False).detach()
    )


@pytest.mark.parametrize(
    "at, value, message",
    [
        (3, sentences(8, 65), "answer_ids: expected"),
        (4, [5, 3], "answer_mask: expected"),
        (5, [0] * 7, "question_of_answer: expected 0 to 3"),
        (5, [4] * 8, "question_of_answer: expected 0 to 3"),
        (6, torch.ones(8, dtype=torch.int64), "weights: expected floating point"),
        (1, sentences(3, 9), "text_mask: expected"),
    ],
)
def test_bad_input_leaves_the_momentum_encoder(at, value, message):
    model, given = make(), list(batch())
    given[at] = value
    with pytest.raises((TypeError, ValueError), match=message):
        model.loss(*given)
    assert model.momentum.num_updates == 0


def test_faults_of_ranking():
    model, given = make(distill=False), batch()[:3]
    ids, lengths = answers()
    with pytest.raises(RuntimeError, match="evaluation mode"):
        model.rank_answers(*given, ids, lengths)
    model.eval()
    with pytest.raises(ValueError, match="k: expected"):
        model.rank_answers(*given, ids, lengths, k=0)
    with pytest.raises(ValueError, match="two tokens"):
        model.rank_answers(*given, ids, [1] * 8)
    ids[3, 0] = 2
    with pytest.raises(ValueError, match="same first token"):
        model.rank_answers(*given, ids, lengths)
