"""The options of `fastvlp train` and `fastvlp evaluate` that say how images become 8-bit RGB."""

import pytest
import torch
from fastvlp_tests import photo_shards
from PIL import Image

from fastvlp.commands import evaluate, train
from fastvlp.data import RgbConversion
from fastvlp.data.shards.write import Sample, write_shard
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks.data import image_options, shard_loader

COMMANDS = [
    lambda options: image_options(train.parse(["clip", *options]).config),
    lambda options: evaluate.parse(["retrieval", "nowhere", *options]).options.image_options(),
]


@pytest.mark.parametrize("parse", COMMANDS, ids=["train", "evaluate"])
@pytest.mark.parametrize(
    "options, colour",
    [
        ([], (255, 255, 255)),
        (["--background", "#ff0000"], (255, 0, 0)),
        (["--convert", "pillow"], (0, 0, 255)),  # what lies under the alpha
    ],
)
def test_the_colour_of_transparent_pixels(tmp_path, monkeypatch, parse, options, colour):
    monkeypatch.setenv("FASTVLP_CACHE", str(tmp_path / "cache"))
    clear = photo_shards.encoded(Image.new("RGBA", (8, 8), (0, 0, 255, 0)), "PNG")
    write_shard(tmp_path / "a.tar", [Sample("a", {"png": clear, "txt": b"a"})])
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    sizes = {"size": 8, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    loader = shard_loader(str(tmp_path), "clip_eval", sizes, 1, None, ranks, **parse(options))
    (batch,) = loader
    loader.close()
    assert (batch.images[0] * 255).round().amin((1, 2)).tolist() == list(colour)


def test_an_unknown_colour_is_refused_by_its_name():
    with pytest.raises(ValueError, match="background: expected a colour .*, got 'whitish'"):
        COMMANDS[1](["--background", "whitish"])


@pytest.mark.parametrize("command", ["retrieval", "zero-shot"])
def test_a_run_is_evaluated_with_its_own_conversion_unless_another_is_asked_for(tmp_path, command):
    settings = "convert: pillow\nbackground: red\nmax_broken: 0.5\nverify: decode\n"
    (tmp_path / "config.yaml").write_text(settings)

    def parsed(*options):
        return evaluate.parse([command, str(tmp_path), *options]).options

    assert parsed().conversion() == RgbConversion("red", "pillow")
    other = parsed("--convert", "range", "--background", "blue").conversion()
    assert other == RgbConversion("blue", "range")
    if command == "retrieval":
        own, others = parsed().image_options(), parsed("--data", "x.tar").image_options()
        assert (own["verify"], own["max_broken"]) == ("decode", 0.5)
        assert (others["verify"], others["max_broken"]) == ("quick", 0.1)
        assert parsed("--max-broken", "0.0").image_options()["max_broken"] == 0.0
