"""The fusion layer on packed text against its padded form and against transformers' BertLayer."""

import copy

import pytest
import torch
from fastvlp_tests.fusion_cases import (
    IMAGES,
    PAIRS,
    case,
    gradients,
    layers,
    layout,
    packed_forward,
    padded_forward,
    text_mask,
)
from fastvlp_tests.tolerance import AddedTerms, assert_as_accurate, epsilon
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from fastvlp.nn import FusionLayer, load_bert_layer


def exact_gradients(forward, layer, c, **kwargs):
    """`gradients` in float64, and what their rounding is relative to.

    That is the results themselves, but the terms that they add for a bias of keys, which moves all
    logits of a row alike: its gradient is zero in exact arithmetic.
    """
    with AddedTerms() as terms:
        exact = gradients(forward, layer, c, torch.float64, **kwargs)
    biases = {n: p for n, p in layer.named_parameters() if n.endswith("key.bias")}
    return exact, exact | {name: terms.of(bias) for name, bias in biases.items()}


def assert_all_as_accurate(ours, eager, wanted, dtype=torch.float32):
    """wanted: of `exact_gradients`."""
    exact, sizes = wanted
    assert ours.keys() == eager.keys() == exact.keys()
    for name, value in exact.items():
        floor = epsilon(dtype) * sizes[name].norm().item()
        assert_as_accurate(name, ours[name], eager[name], value, floor=floor)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_float64_agrees_with_the_padded_form(device, masked, causal):
    c = case(masked=masked, device=device)
    if masked:
        c.key_mask[3, 4] = True  # the padded form gives a mean where there is no key
    packed, padded = layers(32, 4, 48, 24)
    kwargs = dict(causal=causal, key_mask=c.key_mask)
    ours = gradients(packed_forward, packed.eval(), c, torch.float64, **kwargs)
    plain = gradients(padded_forward, padded.eval(), c, torch.float64, **kwargs)
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("cross", [True, False])
def test_float32_is_as_accurate_as_the_padded_form(device, cross):
    c = case(width=64, image_width=48, keys=33, device=device)
    if not cross:
        c.images = None
    packed, padded = (layer.eval() for layer in layers(64, 4, 128, 48, cross=cross))
    ours = gradients(packed_forward, copy.deepcopy(packed), c, torch.float32)
    eager = gradients(padded_forward, copy.deepcopy(padded), c, torch.float32)
    exact = exact_gradients(padded_forward, copy.deepcopy(padded), c)
    assert_all_as_accurate(ours, eager, exact)


def test_autocast(device):
    """bfloat16 matmuls, float32 sums of the residual stream."""
    c = case(width=64, image_width=48, keys=33, device=device)
    packed, padded = (layer.eval() for layer in layers(64, 4, 128, 48))
    ours = gradients(packed_forward, copy.deepcopy(packed), c, torch.float32, autocast=True)
    eager = gradients(padded_forward, copy.deepcopy(padded), c, torch.float32, autocast=True)
    exact = exact_gradients(padded_forward, copy.deepcopy(padded), c)
    assert ours["out"].dtype == torch.float32
    assert_all_as_accurate(ours, eager, exact, torch.bfloat16)


def bert_layer(cross):
    config = BertConfig(
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=96,
        add_cross_attention=cross,
        is_decoder=cross,
        attn_implementation="eager",
    )
    torch.manual_seed(2)
    layer = BertLayer(config).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def bert_forward(layer, text, images, key_mask=None):
    def additive(mask):
        return (~mask[:, None, None]).to(text.dtype) * torch.finfo(text.dtype).min

    mask = text_mask(text.device)
    kwargs = {}
    if images is not None:
        image_index = [i for _, i in PAIRS]
        kwargs["encoder_hidden_states"] = images[image_index]
        if key_mask is not None:
            kwargs["encoder_attention_mask"] = additive(key_mask[image_index])
    out = layer(text[[t for t, _ in PAIRS]], additive(mask), **kwargs)
    return torch.where(mask[..., None], out, 0)


@pytest.mark.parametrize("cross, masked", [(True, False), (True, True), (False, False)])
def test_agrees_with_transformers(device, cross, masked):
    c = case(width=64, image_width=64, keys=33, masked=masked, device=device)
    kwargs = {}
    if masked:
        c.key_mask[3, 4] = True
        kwargs["key_mask"] = c.key_mask
    if not cross:
        c.images = None
    theirs = bert_layer(cross)
    layer = FusionLayer(64, 4, 96, cross=cross).eval().double()
    prefix = "text_encoder.bert.encoder.layer.6."
    state = {prefix + name: value for name, value in theirs.state_dict().items()}
    load_bert_layer(layer, state | {"text_encoder.other": torch.zeros(1)}, prefix)
    ours = gradients(packed_forward, copy.deepcopy(layer), c, torch.float32, **kwargs)
    eager = gradients(bert_forward, copy.deepcopy(theirs), c, torch.float32, **kwargs)
    exact = exact_gradients(bert_forward, copy.deepcopy(theirs), c, **kwargs)
    assert_all_as_accurate(ours, eager, exact)


def test_images_without_keys_and_without_pairs(device):
    """An image without any visible key adds nothing, a NaN there or in an unused image stays."""
    c = case(masked=True, device=device)
    packed, _ = (layer.eval() for layer in layers(32, 4, 48, 24))
    clean = gradients(packed_forward, packed, c, torch.float64, key_mask=c.key_mask)
    assert all(value.isfinite().all() for value in clean.values())
    assert (clean["images"][2] == 0).all() and (clean["images"][3] == 0).all()
    assert (clean["images"][~c.key_mask] == 0).all()


def test_images_are_projected_once(device):
    c = case(device=device)
    layer = layers(32, 4, 48, 24)[0].eval().to(device)
    seen = []
    for projection in (layer.crossattention.self.key, layer.crossattention.self.value):
        projection.register_forward_hook(lambda _, args, out: seen.append(args[0].shape))
    packed_forward(layer, c.text, c.images)
    assert seen == [c.images.shape] * 2 and len(PAIRS) > IMAGES


def test_packed_images_are_the_same(device):
    """Images of different numbers of tokens, one after another."""
    c = case(device=device)
    counts = [9, 3, 1, 6]
    mask = torch.arange(9, device=device) < torch.tensor(counts, device=device)[:, None]
    cu_seqlens = torch.tensor([0, 9, 12, 13, 19], dtype=torch.int32, device=device)
    layer = layers(32, 4, 48, 24)[0].eval().to(device)
    masked = packed_forward(layer, c.text, c.images, key_mask=mask)
    packed = packed_forward(
        layer, c.text, c.images[mask], cu_seqlens_keys=cu_seqlens, max_seqlen_keys=9
    )
    torch.testing.assert_close(masked, packed, rtol=1e-12, atol=1e-12)


def test_probabilities_belong_to_the_graph(device):
    """GradCAM: the weights and the gradient of the output with respect to them."""
    c = case(device=device)
    packed, padded = (layer.eval().to(device) for layer in layers(32, 4, 48, 24))
    text_index, image_index = zip(*PAIRS, strict=True)
    mask = text_mask(device)
    out, wanted = padded(
        c.text[list(text_index)], mask, c.images[list(image_index)], return_probs=True
    )
    (wanted_gradient,) = torch.autograd.grad((out * c.upstream)[mask].sum(), wanted)

    texts, pairs = layout(device)
    tokens = pairs.expand(texts.pack(c.text))
    out, probs = packed(
        tokens, pairs.cu_seqlens_pairs, c.images, pairs.cu_seqlens_images, return_probs=True
    )
    in_order = pairs.select(range(len(PAIRS)))
    plain = packed(tokens, pairs.cu_seqlens_pairs, c.images, pairs.cu_seqlens_images)
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad((in_order(out) * c.upstream[mask]).sum(), probs)
    assert probs.shape == (pairs.total, 4, 9)
    by_row = wanted.transpose(1, 2)[mask], wanted_gradient.transpose(1, 2)[mask]
    torch.testing.assert_close(in_order(probs), by_row[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(in_order(gradient), by_row[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dropout, attention_dropout", [(0.1, 0.0), (0.0, 0.3), (0.2, 0.2)])
def test_dropout_has_the_moments_of_the_padded_form(device, dropout, attention_dropout):
    """One text in 1500 pairs with one image: as many samples of every element."""
    samples, length = 1500, 3
    c = case(device=device)
    packed, padded = (
        layer.train().float().to(device)
        for layer in layers(32, 4, 48, 24, dropout=dropout, attention_dropout=attention_dropout)
    )
    text, image = c.text[0, :length].float(), c.images[:1].float()
    cu_pairs = torch.arange(samples + 1, dtype=torch.int32, device=device) * length
    cu_images = torch.tensor([0, samples * length], dtype=torch.int32, device=device)
    with torch.no_grad():
        torch.manual_seed(5)
        tokens = text.repeat(samples, 1)
        ours = packed(tokens, cu_pairs, image, cu_images).unflatten(0, (samples, length))
        assert not torch.equal(ours.flatten(0, 1), packed(tokens, cu_pairs, image, cu_images))
        torch.manual_seed(5)
        again = packed(tokens, cu_pairs, image, cu_images).unflatten(0, (samples, length))
        mask = torch.ones(samples, length, dtype=torch.bool, device=device)
        plain = padded(text.expand(samples, -1, -1), mask, image.expand(samples, -1, -1))
    assert torch.equal(ours, again)
    for moment in (1, 2):
        a, b = ours**moment, plain**moment
        deviation = ((a.var(0) + b.var(0)) / samples).sqrt()
        # 96 elements: the largest of them stays below 4.5 standard deviations.
        assert ((a.mean(0) - b.mean(0)).abs() <= 4.5 * deviation).all()
    pairs_alike = (ours[0] == ours[1]).float().mean()
    assert pairs_alike < 0.01  # every pair has samples of its own


def test_dropout_only_in_training(device):
    c = case(device=device)
    layer = layers(32, 4, 48, 24)[0].to(device).eval()
    runs = [packed_forward(layer, c.text, c.images) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_break(device, training):
    c = case(device=device)
    layer = layers(32, 4, 48, 24)[0].float().to(device).train(training)
    texts, pairs = layout(device)

    def step(text, images):
        tokens = pairs.expand(texts.pack(text))
        out = layer(
            tokens,
            pairs.cu_seqlens_pairs,
            images,
            pairs.cu_seqlens_images,
            max_seqlen_pairs=pairs.max_seqlen_pairs,
            max_seqlen_images=pairs.max_seqlen_images,
        )
        return pairs.first(out)

    results = []
    for f in (step, torch.compile(step, fullgraph=True)):
        text, images = (x.float().detach().requires_grad_() for x in (c.text, c.images))
        out = f(text, images)
        out.square().sum().backward()
        results.append((out, text.grad, images.grad))
    for plain, compiled in zip(*results, strict=True):
        assert compiled.isfinite().all()
        if not training:
            torch.testing.assert_close(plain, compiled)


def test_parameters_are_named_as_in_bert_layer():
    for cross in (True, False):
        ours = FusionLayer(64, 4, 96, cross=cross).state_dict()
        theirs = bert_layer(cross).state_dict()
        assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}


TEXT = FusionLayer(8, 2, cross=False)
CROSS = FusionLayer(8, 2)
CU = torch.tensor([0, 2], dtype=torch.int32)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: FusionLayer(10, 4), "heads.*divisor of width 10.*4"),
        (lambda: FusionLayer(8, 2, dropout=1.0), "dropout.*below 1.*1.0"),
        (lambda: FusionLayer(8, 2, attention_dropout=-0.1), "attention_dropout.*-0.1"),
        (lambda: CROSS(torch.ones(2, 8), CU), "images.*cross=False"),
        (lambda: TEXT.project_images(torch.ones(2, 3, 8)), "project_images: .*cross=True"),
        (
            lambda: TEXT(torch.ones(2, 3, 8), CU),
            r"tokens: expected packed text \[total, 8\], got \(2, 3, 8\); .*TextLayout.from_mask",
        ),
        (lambda: TEXT(torch.ones(2, 7), CU), r"tokens: expected packed text .*got \(2, 7\)"),
        (lambda: TEXT(None, CU), "tokens: expected packed text .*got NoneType"),
        (lambda: TEXT(torch.ones(2, 8), CU, torch.ones(1, 3, 8), CU), "images.*cross=True"),
        (lambda: TEXT(torch.ones(2, 8), CU, return_probs=True), "return_probs.*cross-attention"),
        (lambda: load_bert_layer(TEXT, CROSS.state_dict()), "unknown.*crossattention"),
        (lambda: load_bert_layer(CROSS, TEXT.state_dict()), "missing.*crossattention"),
        (lambda: load_bert_layer(CROSS, {}, "layer.7."), "prefix 'layer.7.'.*missing"),
        (
            lambda: load_bert_layer(TEXT, FusionLayer(8, 2, 4, cross=False).state_dict()),
            r"intermediate.dense.*\(32.*\(4",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
