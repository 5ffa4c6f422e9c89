"""`import fastvlp`: what it reaches, and what it leaves out so that it is quick."""

import subprocess
import sys

# Modules that take a second or more to import, or packages that a plain install lacks.
SLOW = ("torch._dynamo", "torch.distributed.tensor", "triton", "transformers", "PIL", "tokenizers")


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_slow_is_not_imported():
    code = (
        "import sys, torch; before = {*sys.modules}; import fastvlp; print({*sys.modules} - before)"
    )
    found = run(code)
    assert "'fastvlp.ops'" in found
    assert not [module for module in SLOW if f"'{module}'" in found]


NAMES = (
    "nn.FusionLayer", "models.clip.create", "models.albef.Albef", "models.vilt.Vilt", "data.Loader",
    "evaluate.__doc__", "masking.mask_tokens", "ops.packing.TextLayout", "ops.contrastive",
    "losses.ClipLoss", "optim.AdamWEma", "EmaModel", "FeatureQueue",
)  # fmt: skip


def test_everything_is_reached_from_the_package():
    code = "import fastvlp\n" + "".join(f"assert fastvlp.{name} is not None\n" for name in NAMES)
    code += "try: fastvlp.modles\nexcept AttributeError as error: print(error)"
    assert "'fastvlp' has no attribute 'modles'" in run(code)


def test_explain_knows_every_operator_without_an_import():
    ops = ("attention", "cross_attention", "adamw_ema", "sigmoid_contrastive")
    found = run(f"import fastvlp\nfor op in {ops}: print(fastvlp.ops.explain(op))")
    assert all(f"{op}: runs " in found for op in ops)


def test_functions_of_data_are_found_at_their_earlier_paths():
    from fastvlp.data import cleaning, pair_sources
    from fastvlp.data.shards.sources import read_pairs
    from fastvlp.data.text.cleaning import clean_clip

    assert cleaning.clean_clip is clean_clip and pair_sources.read_pairs is read_pairs
