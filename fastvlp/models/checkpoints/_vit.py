"""timm's ViT and DeiT as the image transformers of ALBEF and ViLT compute them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Classifiers, which those transformers do not have.
CLASSIFIERS = ("head.*", "head_dist.*", "pre_logits.*")
# Names that only other architectures have, which compute something else.
OTHERS = {
    r"blocks\.\d+\.ls[12]\.gamma": "layer scale, as DINOv2",
    r"blocks\.\d+\.gamma_[12]": "layer scale, as BEiT",
    r"blocks\.\d+\.attn\.[qk]_norm\.": "norms of queries and keys",
    r"reg(ister)?_tokens?$": "register tokens, as DINOv2",
    r"norm_pre\.": "a norm before its blocks, as CLIP",
    r"attn_pool\.": "attention pooling, as SigLIP",
}


def plain_vit(state: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The state dict without a distilled DeiT's second token and that token's position.

    Raises:
        ValueError: it is none of timm's ViT or DeiT, or of an architecture that computes otherwise.
    """
    if "pos_embed" not in state or "cls_token" not in state:
        raise ValueError(
            "source: expected the weights of a ViT with timm's names, with pos_embed and "
            f"cls_token; got {len(state)} tensors such as {sorted(state)[:3]}"
        )
    for pattern, what in OTHERS.items():
        found = next((name for name in state if re.match(pattern, name)), None)
        if found is not None:
            raise ValueError(
                f"source: the ViT has {what} ({found}), which this image transformer does not; "
                "supported are timm's plain ViT and DeiT"
            )
    if "dist_token" not in state:
        return dict(state)
    positions = state["pos_embed"]
    notes.append("distilled DeiT: its distillation token and that token's position left out")
    return {k: v for k, v in state.items() if k != "dist_token"} | {
        "pos_embed": torch.cat([positions[:, :1], positions[:, 2:]], 1)
    }
