"""The parts of BERT around its layers: embeddings and the masked language modelling head.

Devlin et al., "BERT", arXiv 1810.04805. Parameter names are those of transformers' BertModel and of
the checkpoints of ALBEF and ViLT; the layers themselves are `fastvlp.nn.FusionLayer`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvlp.nn import Dropout, LayerNorm, Linear
from fastvlp.nn.fusion import EPS


def check_range(name: str, ids: Tensor, limit: int) -> None:
    """Raises ValueError for ids on the CPU outside of 0 to limit - 1."""
    if ids.device.type != "cpu" or not ids.numel():
        return  # a look would wait for the device
    low, high = ids.aminmax()
    if low < 0 or high >= limit:
        raise ValueError(f"{name}: expected 0 to {limit - 1}, got {low} to {high}")


class BertEmbeddings(nn.Module):
    """LN(word + position + token type 0), then dropout."""

    def __init__(
        self,
        vocab_size: int,
        width: int,
        positions: int = 512,
        types: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(types, width)
        self.LayerNorm = LayerNorm(width, EPS)
        self.dropout = Dropout(dropout)
        for embedding in (
            self.word_embeddings,
            self.position_embeddings,
            self.token_type_embeddings,
        ):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Token ids [.., length] to [.., length, width].

        positions: of each token in its text, the shape of `tokens`, for packed tokens; None counts
            along the last axis.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[-1], device=tokens.device)
        x = self.word_embeddings(tokens) + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(x + self.token_type_embeddings.weight[0]))


class MlmHead(nn.Module):
    """Dense, GELU and layer norm, then the matmul with the vocabulary.

    The matmul itself belongs to the loss, `fastvlp.ops.soft_cross_entropy`, which takes
    `decoder.weight` and `bias`: `forward` returns what comes before it.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = nn.ModuleDict(
            {"dense": Linear(width, width), "LayerNorm": LayerNorm(width, EPS)}
        )
        self.decoder = nn.Linear(width, vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        for layer in (self.transform["dense"], self.decoder):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.transform["dense"].bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[.., width] → [.., width], to be multiplied with the vocabulary."""
        return self.transform["LayerNorm"](F.gelu(self.transform["dense"](hidden)))

    def logits(self, hidden: Tensor) -> Tensor:
        """[.., width] → [.., vocab_size]"""
        return F.linear(self(hidden), self.decoder.weight, self.bias)
