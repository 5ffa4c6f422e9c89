"""`fastvlp train` and `fastvlp evaluate` on shards, with vocabularies that are given as files."""

import json

import photo_shards
import pytest
from tiny_vocabularies import bert_vocabulary, bpe_file

from fastvlp import cli
from fastvlp.commands import evaluate
from fastvlp.commands import train as command
from fastvlp.models import base


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
def clip_run(shards, tmp_path_factory):
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
