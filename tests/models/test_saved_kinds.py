"""Models are known by the kind in their files, whoever imported what."""

import json
import subprocess
import sys

import pytest
from fastvlp_tests.tiny_pretraining import ALBEF, VILT

from fastvlp.models import albef, base, clip, vilt
from fastvlp.models.albef.tasks import classification, retrieval, vqa

MAKE = {
    "clip": lambda: clip.create("tiny", vocab_size=40, context_length=6),
    "vilt": lambda: vilt.Vilt(VILT),
    "albef": lambda: albef.Albef(ALBEF),
    "albef-retrieval": lambda: retrieval.AlbefRetrieval(ALBEF),
    "albef-vqa": lambda: vqa.create("tiny"),
    "albef-classifier": lambda: classification.entailment("tiny"),
    "albef-text-assignment": lambda: classification.text_assignment("tiny"),
}
LOAD = """
import sys
from fastvlp.models import base
for path in sys.argv[1:]:
    model = base.load(path)
    print(type(model).__module__, type(model).__qualname__)
"""


def test_a_process_that_imported_no_model_loads_them_all(tmp_path):
    models = {kind: make() for kind, make in MAKE.items()}
    for kind, model in models.items():
        base.save(model, tmp_path / kind)
        assert json.loads((tmp_path / f"{kind}.json").read_text())["kind"] == kind
    # The first files named no kind.
    described = json.loads((tmp_path / "clip.json").read_text())
    del described["kind"]
    (tmp_path / "clip.json").write_text(json.dumps(described))
    paths = [str(tmp_path / kind) for kind in models]
    found = subprocess.run(
        [sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    wanted = [f"{type(m).__module__} {type(m).__qualname__}" for m in models.values()]
    assert found.stdout.splitlines() == wanted


def test_a_kind_belongs_to_one_model():
    kinds = base.kinds()
    with pytest.raises(TypeError, match=r"kind: .*got 'clip', which is that of Clip"):

        class Other(base.Model):
            kind = "clip"
            config_type = clip.ClipConfig

    class Variant(clip.Clip):  # of the same kind: `load` gives the plain model
        pass

    described = base.description(MAKE["clip"]())
    assert base.kinds() == kinds and type(base.from_description(described)) is clip.Clip
    assert set(MAKE) <= set(kinds)
