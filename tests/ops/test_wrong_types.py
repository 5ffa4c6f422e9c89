"""What is no tensor is refused by every public function, with the argument's name."""

import inspect

import pytest
import torch

from fastvlp import masking, nn, ops
from fastvlp.evaluate.retrieval import retrieval
from fastvlp.ops.packing import PairLayout, TextLayout

X, Q, IDS = torch.zeros(4, 8), torch.zeros(4, 2, 8), torch.zeros(4, dtype=torch.int64)
KEYS, STARTS = torch.zeros(2, 3, 2, 8), torch.tensor([0, 2, 4])
WORDS, PADDING = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool)
SEQUENCES = torch.zeros(2, 3, 2, 8)
WEIGHT, BIAS, SCALAR = torch.zeros(5, 8), torch.zeros(5), torch.tensor(0.5)
NORM = nn.Norm(torch.ones(8), torch.zeros(8), 1e-5)
VOCABULARY = masking.MaskingVocabulary(9, 1, 2, 3, None, torch.zeros(9, dtype=torch.bool))
TEXTS = TextLayout.from_lengths([2, 1], 3)
PAIRS = PairLayout.make(TEXTS, [0, 1], [0, 0], 1)

# Every public function that takes tensors, with arguments that it takes.
CALLS = {
    ops.alignment_padding: {"text_lengths": IDS, "image_lengths": IDS, "text_size": 3,
                            "image_size": 3},
    ops.contrastive: {"image_features": X, "text_features": X, "logit_scale": SCALAR},
    ops.cross_attention: {"q": Q, "k": KEYS, "v": KEYS, "cu_seqlens_q": STARTS},
    ops.matmul: {"a": X, "b": X.T},
    ops.momentum_contrastive: {"image_features": X, "text_features": X, "image_momentum": X,
                               "text_momentum": X, "image_queue": X, "text_queue": X,
                               "temperature": SCALAR},
    ops.select_rows: {"labels": IDS},
    ops.sigmoid_contrastive: {"image_features": X, "text_features": X, "logit_scale": SCALAR,
                              "logit_bias": SCALAR},
    ops.soft_cross_entropy: {"hidden": X, "weight": WEIGHT, "bias": BIAS, "labels": IDS},
    ops.word_patch_alignment: {"text_features": WORDS, "image_features": WORDS,
                               "text_padding": PADDING, "image_padding": PADDING},
    ops.word_patch_alignment_loss: {"distance": X[0], "is_positive": X[0] > 0},
    nn.attention: {"q": SEQUENCES, "k": SEQUENCES, "v": SEQUENCES},
    nn.feed_forward: {"x": X, "norm": NORM, "weight1": WEIGHT, "bias1": BIAS,
                      "weight2": WEIGHT.T, "bias2": X[0]},
    nn.linear: {"x": X, "weight": WEIGHT, "bias": BIAS},
    nn.norm_linear: {"x": X, "norm": NORM, "weight": WEIGHT, "bias": BIAS},
    masking.mask_tokens: {"ids": IDS[None], "vocabulary": VOCABULARY, "keys": IDS[:1]},
    retrieval: {"image_features": X, "text_features": X},
    TextLayout.from_lengths: {"lengths": [1, 2], "padded_length": 3},
    TextLayout.from_mask: {"mask": PADDING},
    TEXTS.pack.__call__: {"padded": WORDS},
    TEXTS.first.__call__: {"rows": X[:3]},
    PairLayout.make: {"texts": TEXTS, "text_index": [0, 1], "image_index": [0, 0], "images": 1},
    PAIRS.rows: {"pairs": [0]},
    PAIRS.select: {"pairs": [0]},
    PAIRS.keep: {"rows": [0, 1]},
}  # fmt: skip
# May be left out.
OPTIONAL = {(ops.soft_cross_entropy, "bias"), (nn.feed_forward, "norm"),
            (nn.feed_forward, "bias1"), (nn.feed_forward, "bias2"), (nn.norm_linear, "bias"),
            (nn.linear, "bias")}  # fmt: skip
# Of lists of tensors, checked with theirs; of no tensors at all.
OTHERS = {
    "adamw_ema",
    "ema",
    "last_exceeding",
    "explain",
    "operators",
    "release_workspace",
    "load_bert_layer",
}


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__qualname__)
def test_what_is_no_tensor_is_refused(function):
    good = CALLS[function]
    function(**good)
    for name in good:
        for wrong in (None, "text", [X], object(), {"a": 1}):
            if wrong is None and (function, name) in OPTIONAL:
                continue
            with pytest.raises((TypeError, ValueError)) as caught:
                function(**good | {name: wrong})
            message = str(caught.value)
            assert name in message.split(":")[0], f"{name}={wrong!r}: {message}"
            assert "got" in message, message


def test_every_public_function_is_among_them():
    public = {
        name: getattr(module, name)
        for module in (ops, nn)
        for name in module.__all__
        if inspect.isfunction(getattr(module, name)) and not name.endswith("_reference")
    }
    assert set(public) - OTHERS == {f.__name__ for f in CALLS} & set(public)


def test_lists_of_tensors_stay_lists():
    with pytest.raises(ValueError, match=r"hidden\[1\]: expected \[.., D\] with the rows \(4,\)"):
        ops.select_rows(IDS, X, X[:3])
    with pytest.raises(TypeError, match=r"hidden\[0\]: expected a torch.Tensor, got NoneType"):
        ops.select_rows(IDS, None)


@pytest.mark.parametrize("rows", [[-1], [3], [0, 0], [2**31 - 1], torch.tensor([0.5]), [0, True]])
def test_rows_to_keep_are_rows_of_the_layout_each_once(rows):
    with pytest.raises(ValueError, match="rows: expected"):
        PAIRS.keep(rows)


@pytest.mark.parametrize("bad", [-1, 9])
@pytest.mark.parametrize("whole_word", [False, True])
def test_ids_to_mask_are_of_the_vocabulary(bad, whole_word):
    ids = torch.tensor([[3, 4, bad, 2]])
    with pytest.raises(ValueError, match=f"ids: expected 0 to 8, .*got .*{bad}"):
        masking.mask_tokens(ids, VOCABULARY, IDS[:1], whole_word=whole_word)


def test_no_rows_of_any_stride_are_no_rows():
    empty, padding = torch.zeros(0, 3, 16)[..., ::2], PADDING[:0]
    assert empty.stride(-1) == 2
    assert ops.word_patch_alignment(empty, empty, padding, padding).shape == (0,)
    none = torch.zeros(2, 0, 16)[..., ::2]
    assert ops.word_patch_alignment(none, none, PADDING[:, :0], PADDING[:, :0]).tolist() == [0, 0]
