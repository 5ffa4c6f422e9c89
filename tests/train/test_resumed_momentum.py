"""A momentum model in other trainers: a run resumed from disk averages on as if never stopped.

The trainers, callbacks and checkpoints are those of the page docs/integrations.md.
"""

import pytest
import torch
from fastvlp_tests.pages import INTEGRATIONS, sections


def page_of(trainer):
    """The names that the page's block on a momentum model defines."""
    imported = {"Hugging Face": "transformers", "Lightning": "lightning"}[trainer]
    found = [
        block
        for _, block in sections(INTEGRATIONS)
        if f"import {imported}" in block or f"from {imported}" in block
    ]
    (block,) = (text for text in found if "SaveMomentum" in text)
    definitions = block[: block.index("\ntrain(")]
    namespace = {"__name__": "page"}
    exec(definitions, namespace)
    return namespace


RUNS = {
    "Hugging Face": (lambda page: page["train"](2), lambda page: page["train"](4, resume=True)),
    "Lightning": (
        lambda page: page["train"](1),
        lambda page: page["train"](2, resume="with_momentum.ckpt"),
    ),
}
WHOLE = {"Hugging Face": 4, "Lightning": 2}


def values(result):
    model, momentum, _ = result
    return [t.clone() for module in (model, momentum) for t in module.state_dict().values()]


@pytest.mark.parametrize("trainer", RUNS)
def test_a_resumed_run_averages_on(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page = page_of(trainer)
    begin, go_on = RUNS[trainer]
    torch.manual_seed(1)
    wanted = page["train"](WHOLE[trainer])
    torch.manual_seed(1)
    begin(page)
    torch.manual_seed(2)  # a new process has other weights
    found = go_on(page)
    assert found[1].num_updates == wanted[1].num_updates == 4
    for ours, theirs in zip(values(found), values(wanted), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("trainer", RUNS)
def test_a_run_resumed_without_the_momentum_is_refused(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page = page_of(trainer)
    begin, go_on = RUNS[trainer]
    begin(page)
    monkeypatch.setattr(page["EmaModel"], "load_state_dict", lambda self, state: None)
    with pytest.raises(RuntimeError, match="saved with an EmaModel of 2 updates, this one has 0"):
        go_on(page)
