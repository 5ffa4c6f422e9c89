"""Names of CLIP models: OpenAI's spelling, open_clip's, and the nearest of one that is neither."""

import open_clip
import pytest

from fastvlp.models import albef, base, clip, vilt


@pytest.mark.parametrize("key", [key for key in clip.CONFIGS if key != "tiny"])
def test_open_clips_spelling_is_open_clips_model(key):
    spelled = key.replace("/", "-").replace("@336px", "-336")
    theirs = open_clip.get_model_config(spelled)
    found = clip.config_of_name(spelled)
    assert found.embed_dim == theirs["embed_dim"]
    assert found.image_size == theirs["vision_cfg"]["image_size"]
    if spelled != key:  # of what both spell alike, OpenAI's activation
        assert found.activation == ("quick_gelu" if theirs.get("quick_gelu") else "gelu")
    quick = clip.config_of_name(f"{spelled}-quickgelu")
    assert quick.activation == "quick_gelu"
    assert clip.config_of_name(key) == clip.CONFIGS[key]


@pytest.mark.parametrize(
    ("name", "nearest"), [("ViT-B32", "ViT-B/32"), ("vit-b/32", "ViT-B/32"), ("tinny", "tiny")]
)
def test_an_unknown_name_suggests_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"^name: expected .*, got '{name}'; did you mean") as told:
        clip.create(name)
    assert str(told.value).endswith(f"did you mean '{nearest}'?")


@pytest.mark.parametrize("system", [vilt, albef])
def test_the_other_systems_suggest_names_as_well(system):
    with pytest.raises(ValueError, match="did you mean 'mini'"):
        system.create("minni")


def test_a_name_that_is_like_none_has_no_suggestion():
    assert str(base.unknown_name("model", "xyz", ["b", "a"])) == (
        "model: expected one of a, b, got 'xyz'"
    )
