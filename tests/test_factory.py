"""`fastvlp.create`: model, preprocess and tokenizer of a name, a run, a file or a folder."""

import dataclasses
import json

import numpy as np
import open_clip
import pytest
import torch
from fastvlp_tests import photo_shards
from fastvlp_tests.clip_cases import TINY, tiny_open_clip, transformers_model
from fastvlp_tests.tiny_vocabularies import bert_vocabulary, bpe_file
from safetensors.torch import save_file

import fastvlp
from fastvlp.data import Loader, RgbConversion
from fastvlp.data.images.integrity import ImageFault
from fastvlp.data.images.preprocess import Preprocess
from fastvlp.data.images.recipes import recipe
from fastvlp.data.text import train_tokenizer
from fastvlp.models import albef, base, clip, vilt
from fastvlp.models.albef.tasks.classification import AlbefClassifier, ClassifierConfig
from fastvlp.models.albef.tasks.common import FinetuningConfig
from fastvlp.models.albef.tasks.retrieval import AlbefRetrieval
from fastvlp.models.albef.tasks.vqa import AlbefVqa

SMALL = dict(vision_width=16, vision_layers=1, vision_heads=1, text_width=16, text_layers=1,
             text_heads=1, embed_dim=8)  # fmt: skip


def features(created, text="a red bus"):
    model, preprocess, tokenizer = created
    with torch.inference_mode():
        image = preprocess(photo_shards.photograph(0))[None]
        return model.encode_image(image), model.encode_text(tokenizer([text]))


def test_a_name_gives_a_model_its_transforms_and_clips_tokenizer():
    created = fastvlp.create("ViT-B-32", **SMALL)
    assert created.model.config.activation == "gelu" and not created.model.training
    assert [list(each.shape) for each in features(created)] == [[1, 8], [1, 8]]
    theirs = open_clip.get_tokenizer("ViT-B-32")(["a photo of a red bus"])
    assert created.tokenizer(["a photo of a red bus"]).equal(theirs)
    image = photo_shards.photograph(3, 300, 250)
    wanted = open_clip.image_transform(224, is_train=False)(image)
    assert (created.preprocess(image) - wanted).abs().max() < 1e-6


def test_an_activation_and_a_vocabulary_can_be_given(tmp_path):
    file = bpe_file(tmp_path)
    made = fastvlp.create("tiny", tokenizer=file, activation="quick_gelu", **SMALL)
    assert made.model.config.activation == "quick_gelu"
    assert made.model.config.vocab_size == made.tokenizer.vocab_size < 1000


@pytest.fixture
def run(tmp_path):
    """What a run of CLIP on transparent images leaves."""
    tokenizer = train_tokenizer(["a red bus", "a blue car"], context_length=8)
    model = clip.create("tiny", vocab_size=tokenizer.vocab_size, context_length=8, **SMALL)
    base.save(model, tmp_path / "model")
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "config.yaml").write_text("data: mine\nbackground: red\nconvert: range\n")
    return tmp_path


@pytest.mark.parametrize("place", ["", "model", "model.safetensors"])
def test_a_runs_folder_or_its_file_has_all_of_its_own(run, place):
    model, preprocess, tokenizer = created = fastvlp.create(str(run / place))
    assert tokenizer(["a red bus"])[0, :5].tolist() == tokenizer(["A RED bus"])[0, :5].tolist()
    assert preprocess.convert == RgbConversion(background="red")
    whole = base.load(run / "model")
    with torch.inference_mode():
        assert features(created)[1].equal(whole.encode_text(tokenizer(["a red bus"])))


def test_openmojis_normalisation_is_that_of_its_training(run):
    (run / "config.yaml").write_text("data: openmoji\n")
    white = fastvlp.create(run).preprocess(photo_shards.Image.new("RGB", (70, 70), "white"))
    assert white.shape == (3, 64, 64) and (white == 1).all()


def test_open_clips_folder_says_its_activation_and_its_normalisation(tmp_path):
    theirs = tiny_open_clip()
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    values = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
    described = {"model_cfg": TINY, "preprocess_cfg": values}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    train_tokenizer(["a red bus"], context_length=20).save(tmp_path / "tokenizer.json")
    model, preprocess, _ = fastvlp.create(tmp_path)
    assert (preprocess.recipe.mean, preprocess.recipe.std) == ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_image(images), theirs.encode_image(images))


def test_transformers_folder_brings_model_values_and_vocabulary(tmp_path):
    theirs = transformers_model()
    theirs.save_pretrained(tmp_path)
    values = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    train_tokenizer(["a red bus"], context_length=20).save(tmp_path / "tokenizer.json")
    model, preprocess, tokenizer = fastvlp.create(tmp_path)
    assert preprocess.recipe.std == (0.1, 0.2, 0.3) and model.config.end_token is None
    assert tokenizer(["a red bus"]).shape == (1, 20)


def test_weights_of_a_named_model(tmp_path):
    small = clip.create("tiny")
    torch.save(small.state_dict(), tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match="activation: open_clip CLIP weights work with the one"):
        fastvlp.create("tiny", pretrained=tmp_path / "tiny.pt")
    loaded = fastvlp.create("tiny", pretrained=tmp_path / "tiny.pt", activation="gelu").model
    assert loaded.visual.proj.equal(small.visual.proj)


def test_a_vilt_has_its_own_transforms_and_tokenizer(tmp_path):
    base.save(vilt.create("tiny", vocab_size=20), tmp_path / "model")
    bert_vocabulary(tmp_path, ["a", "bus"])
    model, preprocess, tokenizer = fastvlp.create(tmp_path)
    assert model.kind == "vilt" and tokenizer(["a bus"]).shape[1] == 4
    image = preprocess(photo_shards.photograph(0, 96, 72))
    assert image.shape[1] % model.config.patch_size == 0 != image.shape[2] - image.shape[1]


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("ViT-B/33", {}, ValueError, "did you mean 'ViT-B/32'\\?; nor is there a file or folder"),
        ("runs/clp", {}, ValueError, "^name: expected one of .*; nor is there a file or folder"),
        ("tiny", {"end_token": 3}, ValueError, "end_token: expected none, because the model has"),
        ("tiny", {"width": 3}, TypeError, "width"),
        ("{0}", {"embed_dim": 3}, ValueError, "embed_dim: expected none, because .* has weights"),
        ("{0}", {"pretrained": "x"}, ValueError, "pretrained: expected none, because .* has wei"),
        ("{0}/..", {}, FileNotFoundError, "path: expected one of"),
    ],
)
def test_mistakes_are_named(run, name, options, error, message):
    with pytest.raises(error, match=message):
        fastvlp.create(name.format(run), **options)


def test_preprocess_has_the_loaders_pixels(tmp_path):
    shards = photo_shards.write(tmp_path / "shards", 4)
    wanted = next(iter(Loader(shards, recipe("clip_eval", size=40), 4, device="cpu"))).images
    preprocess = Preprocess(recipe("clip_eval", size=40))
    for number in range(4):
        (tmp_path / "x.jpg").write_bytes(photo_shards.good(number).members["jpg"])
        assert preprocess.read(tmp_path / "x.jpg").equal(wanted[number])


def test_what_is_no_image_is_named(tmp_path):
    preprocess = Preprocess(recipe("clip_eval", size=32))
    (tmp_path / "notes.jpg").write_text("no image")
    with pytest.raises(ImageFault, match="notes.jpg: the image cannot be decoded"):
        preprocess.read(tmp_path / "notes.jpg")
    with pytest.raises(ImageFault, match="gone.jpg: No such file"):
        preprocess.read(tmp_path / "gone.jpg")
    with pytest.raises(TypeError, match="image: expected a Pillow image, got ndarray"):
        preprocess(np.zeros((3, 8, 8)))
    with pytest.raises(ValueError, match="recipe: expected one for evaluation"):
        Preprocess(recipe("clip_train"))


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (AlbefRetrieval, dataclasses.replace(albef.CONFIGS["tiny"], queue_ids=True)),
        (AlbefClassifier, ClassifierConfig.named("tiny")),
        (AlbefVqa, FinetuningConfig.named("tiny")),
    ],
)
def test_fine_tuned_models_have_what_belongs_to_their_system(model, config, tmp_path):
    base.save(model(dataclasses.replace(config, vocab_size=20)), tmp_path / "model")
    bert_vocabulary(tmp_path, ["a", "bus"])
    made = fastvlp.create(tmp_path)
    assert type(made.model) is model
    side = config.image_size
    assert made.preprocess(photo_shards.photograph(0, 96, 72)).shape == (3, side, side)
    assert made.tokenizer(["a bus"]).shape == (1, 3)
