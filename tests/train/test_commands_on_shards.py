"""`fastvlp train` and `fastvlp evaluate` on shards, with vocabularies that are given as files."""

import json

import pytest
import torch
from fastvlp_tests import photo_shards
from fastvlp_tests.albef_peer import PeerAlbef
from fastvlp_tests.clip_cases import tiny_open_clip, transformers_model
from fastvlp_tests.tiny_vocabularies import bert_vocabulary, bpe_file
from fastvlp_tests.vilt_cases import small

from fastvlp import cli
from fastvlp.commands import evaluate
from fastvlp.commands import train as command
from fastvlp.models import base, clip
from fastvlp.train import trained

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return photo_shards.write(tmp_path_factory.mktemp("shards"), 12, 6)


def options(folder, shards, tokenizer):
    return [
        "--folder", str(folder), "--data", shards, "--eval-data", shards,
        "--tokenizer", str(tokenizer), "--steps", "2", "--batch-size", "4", "--no-progress",
        "--precision", "float32", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def clip_run(shards, tmp_path_factory, quick_runs):
    """A small CLIP by the paper's settings, with a vocabulary of CLIP's format."""
    folder = tmp_path_factory.mktemp("run")
    given = options(folder, shards, bpe_file(folder))
    command.parse(["clip", "--preset", "paper", "--model", "tiny", *given]).run()
    return folder


def test_clip_by_the_papers_settings_with_clips_vocabulary(clip_run, shards):
    described = json.loads((clip_run / "model.json").read_text())
    assert (described["vocab_size"], described["context_length"]) == (512 + 6 + 2, 77)
    found = evaluate.parse(["retrieval", str(clip_run), "--data", shards]).run()
    assert 0 <= found["text_to_image R@1"] <= found["text_to_image R@10"] <= 1


@pytest.mark.parametrize("system", ["vilt", "albef"])
def test_berts_vocabulary_is_taken_by_the_others(tmp_path, shards, system):
    given = options(tmp_path, shards, bert_vocabulary(tmp_path, ["caption", "1", "##0"]))
    command.parse([system, "--model", "tiny", *given]).run()
    assert base.load(tmp_path / "model").config.vocab_size == 8


@pytest.mark.parametrize(
    ("system", "make"), [("clip", bert_vocabulary), ("vilt", bpe_file), ("albef", bpe_file)]
)
def test_a_vocabulary_of_another_kind_is_refused(tmp_path, shards, system, make, capsys):
    given = options(tmp_path / "run", shards, make(tmp_path))
    with pytest.raises(SystemExit):
        cli.main(["train", system, "--model", "tiny", *given])
    shown = capsys.readouterr().err
    assert "tokenizer: expected" in shown and "; found " in shown


def test_a_model_that_the_library_saved_is_evaluated_with_a_given_vocabulary(tmp_path, shards):
    model = clip.create("tiny", vocab_size=520, context_length=20)
    base.save(model, tmp_path / "mine")
    arguments = ["--data", shards, "--tokenizer", str(bpe_file(tmp_path))]
    found = [
        evaluate.parse(["retrieval", str(tmp_path / name), *arguments]).run()
        for name in ("mine", "mine.safetensors")
    ]
    assert found[0] == found[1] and found[0]["image_to_text R@10"] <= 1


@pytest.fixture
def published(tmp_path):
    """Files of a tiny model of each kind, as they are published, with a vocabulary of its size."""
    words = [f"w{i}" for i in range(20)]
    vocabulary = bert_vocabulary(tmp_path, ["caption", *words])
    torch.save(PeerAlbef().checkpoint(), tmp_path / "albef.pth")
    vilt = small(width=64, heads=1, vocab_size=60, context_length=12)
    torch.save({"state_dict": vilt.state_dict()}, tmp_path / "vilt.ckpt")
    return {"albef": tmp_path / "albef.pth", "vilt": tmp_path / "vilt.ckpt"}, vocabulary


def test_albefs_and_vilts_checkpoints_are_evaluated(published, shards, capsys):
    models, vocabulary = published
    given = ["--data", shards, "--batch-size", "6"]
    found = evaluate.parse(["retrieval", str(models["albef"]), *given]).run()  # vocab.txt beside it
    assert found["reranked text_to_image R@10"] <= 1
    assert "ALBEF" in capsys.readouterr().out
    given += ["--tokenizer", str(vocabulary)]
    assert "matching/accuracy" in evaluate.parse(["matching", str(models["vilt"]), *given]).run()
    vocabulary.unlink()
    with pytest.raises(ValueError, match="tokenizer: expected at most the model's 300 ids, got"):
        evaluate.parse(["retrieval", str(models["albef"]), "--data", shards]).run()


@pytest.fixture
def folders(tmp_path):
    for i in range(6):
        place = tmp_path / "images" / ("cat" if i % 2 else "sat")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.jpg").write_bytes(photo_shards.jpeg(i))
    return tmp_path / "images"


def test_zero_shot_by_a_checkpoint_with_an_ensemble_of_prompts(tmp_path, folders):
    peer = transformers_model(eos=519, vocab_size=520)
    peer.save_pretrained(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("the {}\na {} sat\n")
    (tmp_path / "names.txt").write_text("cat\nthe\n")
    vocabulary = bpe_file(tmp_path)
    arguments = [
        "--images", str(folders), "--tokenizer", str(vocabulary),
        "--templates", str(tmp_path / "prompts.txt"), "--classes", str(tmp_path / "names.txt"),
    ]  # fmt: skip
    found = evaluate.parse(["zero-shot", str(tmp_path / "clip"), *arguments]).run()
    # By definition, one image and one prompt at a time.
    from fastvlp.data import class_folders
    from fastvlp.data.images import recipes
    from fastvlp.data.text import ClipTokenizer
    from fastvlp.models.checkpoints import load_any

    model, _ = load_any(tmp_path / "clip")
    size, length = model.config.image_size, model.config.context_length
    tokenizer = ClipTokenizer(vocabulary, context_length=length, truncate=True)
    recipe = recipes.recipe("clip_eval")
    right = []
    with torch.no_grad():
        classes = []
        for name in ("cat", "the"):
            each = [
                torch.nn.functional.normalize(model.encode_text(tokenizer([prompt])), dim=-1)
                for prompt in (f"the {name}", f"a {name} sat")
            ]
            classes.append(sum(each) / 2)
        for label, folder in enumerate(("cat", "sat")):
            for path in sorted((folders / folder).iterdir()):
                image = class_folders.read(path, size, recipe.mean, recipe.std)
                feature = model.encode_image(image[None])
                scores = [
                    torch.nn.functional.cosine_similarity(feature, each).item() for each in classes
                ]
                right.append(scores.index(max(scores)) == label)
    assert found["top-1"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("token, wanted", [("largest", None), ("7", 7)])
def test_weights_that_do_not_tell_where_a_text_is_read_take_an_end_token(tmp_path, token, wanted):
    weights = tmp_path / "model.pt"
    torch.save(tiny_open_clip().state_dict(), weights)
    options = ["retrieval", str(weights), "--activation", "gelu"]
    with pytest.raises(ValueError, match="end_token: the weights do not tell"):
        evaluate.parse(options).options._load()
    model, _ = evaluate.parse([*options, "--end-token", token]).options._load()
    assert model.config.end_token == wanted


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize("option, value", [("end-token", "7"), ("activation", "gelu")])
def test_a_run_tells_all_about_its_model(clip_run, monkeypatch, unfinished, option, value):
    if unfinished:
        monkeypatch.setattr(trained.run_folder, "unsaved", lambda folder: (None, "a checkpoint"))
    options = evaluate.parse(["retrieval", str(clip_run), f"--{option}", value]).options
    with pytest.raises(ValueError, match=f"{option.replace('-', '_')}: expected none, because"):
        options._load()
