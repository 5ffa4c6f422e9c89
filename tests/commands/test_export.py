"""Exported models in the libraries themselves: features, tokens and images are equal."""

import dataclasses

import open_clip
import pytest
import torch
import transformers
from fastvlp_tests import photo_shards
from fastvlp_tests.clip_cases import inputs, perturb
from fastvlp_tests.tiny_vocabularies import bpe_file

import fastvlp
from fastvlp import cli
from fastvlp.commands.export import parse
from fastvlp.data.text import ClipTokenizer, save_for_transformers
from fastvlp.models import base, clip
from fastvlp.models.checkpoints import export_clip, load_clip

CAPTIONS = ["caption 3", "CAPTION 5, unknown words", "caption " * 20]


@pytest.mark.parametrize("to", ["open_clip", "transformers"])
def test_a_run_has_the_same_features_in_the_library(small_run, tmp_path, to, capsys):
    cli.main(["export", str(small_run), "--to", to, "--output", str(tmp_path / to)])
    assert str(tmp_path / to) in capsys.readouterr().out
    model, preprocess, tokenizer = fastvlp.create(small_run)
    image = photo_shards.photograph(5, 200, 130)
    if to == "open_clip":
        place = f"local-dir:{tmp_path / to}"
        theirs, _, transform = open_clip.create_model_and_transforms(place)
        theirs.eval()
        ids = open_clip.get_tokenizer(place)(CAPTIONS)
        pixels = transform(image)[None]
        encode_image, encode_text = theirs.encode_image, theirs.encode_text
    else:
        theirs = transformers.CLIPModel.from_pretrained(tmp_path / to).eval()
        length = tokenizer.context_length
        ids = transformers.AutoTokenizer.from_pretrained(tmp_path / to)(
            CAPTIONS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / to, backend="pil")
        pixels = processor(image, return_tensors="pt").pixel_values

        def encode_image(images):
            return theirs.visual_projection(theirs.vision_model(images).pooler_output)

        def encode_text(ids):
            return theirs.text_projection(theirs.text_model(ids).pooler_output)

    assert ids.equal(tokenizer(CAPTIONS))
    assert (pixels - preprocess(image)[None]).abs().max() < 1e-5
    with torch.inference_mode():
        torch.testing.assert_close(
            encode_image(pixels), model.encode_image(pixels), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(encode_text(ids), model.encode_text(ids), atol=1e-5, rtol=1e-5)
    assert theirs.logit_scale.item() == pytest.approx(model.logit_scale.item(), abs=1e-6)


SMALL = clip.ClipConfig(
    24, 32, 8, 40, 2, 2, 32, 2, 4, context_length=12, vocab_size=90, activation="gelu",
    vision_hidden=101, text_hidden=70,
)  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"activation": "quick_gelu"}, {"end_token": 40}])
@pytest.mark.parametrize("to", ["open_clip", "transformers"])
def test_every_size_is_read_back(tmp_path, to, changes):
    torch.manual_seed(0)
    model = perturb(clip.Clip(dataclasses.replace(SMALL, **changes)))
    export_clip(model, tmp_path, to, mean=(0.1, 0.2, 0.3))
    back, report = load_clip(tmp_path)
    assert back.config == model.config and not report.missing and not report.unused
    assert all(v.equal(model.state_dict()[k]) for k, v in back.state_dict().items())
    assert fastvlp.train.trained.image_values(tmp_path)[0] == (0.1, 0.2, 0.3)


def test_a_resnet_goes_to_open_clip_only(tmp_path):
    config = clip.ClipConfig(16, 32, 32, 8, (1, 1, 1, 1), 4, 16, 1, 2, 10, 50, activation="gelu")
    model = perturb(clip.Clip(config))
    with pytest.raises(ValueError, match="transformers has no CLIP with a ResNet"):
        export_clip(model, tmp_path, "transformers")
    export_clip(model, tmp_path, "open_clip")
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    images, tokens = inputs(config)
    with torch.inference_mode():
        torch.testing.assert_close(
            theirs.encode_image(images), model.encode_image(images), atol=1e-5, rtol=1e-5
        )
    with pytest.raises(ValueError, match="to: expected 'open_clip' or 'transformers', got 'onnx'"):
        export_clip(model, tmp_path, "onnx")


def test_clips_vocabulary_gives_the_same_ids_in_transformers(tmp_path):
    tokenizer = ClipTokenizer(context_length=20, truncate=True)
    save_for_transformers(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["A photo of a  red BUS, isn't it?", "word " * 40, "naïve café 😀"]
    ids = theirs(texts, padding="max_length", max_length=20, truncation=True, return_tensors="pt")
    assert ids.input_ids.equal(tokenizer(texts))
    with pytest.raises(TypeError, match="tokenizer: expected a CaptionTokenizer or a Clip"):
        save_for_transformers(len, tmp_path)


def test_the_default_folder_is_beside_the_model(tmp_path):
    file = bpe_file(tmp_path)
    length = ClipTokenizer(file).vocab_size
    base.save(
        clip.create("tiny", vocab_size=length, vision_layers=1, text_layers=1), tmp_path / "a"
    )
    folder = parse([str(tmp_path / "a.safetensors"), "--to", "open_clip", "--tokenizer",
                    str(file)]).run()  # fmt: skip
    assert folder == tmp_path / "open_clip" and (folder / "tokenizer.json").is_file()
