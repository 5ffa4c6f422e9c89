"""The last checkpoint of a run, and whether two of them are equal to the bit."""

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def last_state(folder, tmp_path):
    path = sorted((folder / "checkpoints").glob("step-*"))[-1]
    dcp_to_torch_save(path, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=False)


def same(ours, wanted):
    if isinstance(wanted, dict):
        return ours.keys() == wanted.keys() and all(same(ours[k], wanted[k]) for k in wanted)
    if isinstance(wanted, torch.Tensor):
        return torch.equal(ours, wanted)
    return ours == wanted
