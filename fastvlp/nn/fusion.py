"""One BERT layer on packed text, with cross-attention to images: the fusion encoder of ALBEF.

    a = LN(x + dropout(W_o selfattention(x) + b_o))          within each pair
    c = LN(a + dropout(W_o' crossattention(a, images) + b_o'))  to the pair's image
    y = LN(c + dropout(W_2 GELU(W_1 c + b_1) + b_2))

Source: Devlin et al., "BERT", arXiv 1810.04805; Li et al., "Align before fuse" (ALBEF), arXiv
2107.07651, section 3.1. Layer norm comes after the sum, with epsilon 1e-12; GELU is exact.

Parameters have the names of transformers' BertLayer and of ALBEF's checkpoints (see
`load_bert_layer`).

Cost forward, for T text rows, n images of L tokens, widths D (text) and E (images), feed-forward
width I, H heads of d = D / H:

    text        2 T D (6 D + 2 I)      q, k, v, output; query, output; two feed-forward matmuls
    images      4 n L E D              keys and values, once for each image
    attention   4 D (sum over pairs of t^2 + sum over images of rows * L)

and twice that backward, plus one more computation of the attention logits. The padded layer that
repeats an image for each of its P pairs takes 4 P n L E D for the images: at 4 pairs, 30 tokens,
577 keys and widths of 768, 70 % of its 7.7 GFLOP an image forward, where this one takes 3.6, and
2.5 if the texts fill half of their padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import cross_attention
from ..ops.packing import KeptRows
from .dropout import Dropout
from .feed_forward import feed_forward
from .linear import Linear
from .norm import LayerNorm

EPS = 1e-12


class _BertParameters(nn.Module):
    """The parameters and the padded computation, shared by the packed and the padded layer.

    Args:
        width: of the text, D.
        heads: attention heads; they divide the width.
        hidden: width of the feed-forward part; None for 4 D.
        image_width: of the image tokens, E; None for D. Ignored without `cross`.
        cross: with cross-attention. Without it this is a text layer (ALBEF's layers 0 to 5).
        dropout: of the outputs of attention and feed-forward.
        attention_dropout: of the attention weights.
    """

    # By what the padded form attends: "eager" matmuls, or "sdpa", which has no weights to return.
    padded_attention = "eager"

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int | None = None,
        image_width: int | None = None,
        *,
        cross: bool = True,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: expected a divisor of width {width}, got {heads}")
        for name, p in (("dropout", dropout), ("attention_dropout", attention_dropout)):
            if not 0 <= p < 1:
                raise ValueError(f"{name}: expected a probability below 1, got {p}")
        hidden = 4 * width if hidden is None else hidden
        self.width, self.heads, self.attention_dropout = width, heads, attention_dropout
        self.attention = _Attention(width, width, dropout)
        self.crossattention = None
        if cross:
            self.crossattention = _Attention(width, image_width or width, dropout)
        self.intermediate = nn.ModuleDict({"dense": Linear(width, hidden)})
        self.output = _Output(hidden, width, dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """BERT's initialisation: weights N(0, 0.02), biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.output(F.gelu(self.intermediate["dense"](x)), x)

    def _check_packed(self, tokens: Tensor) -> None:
        if isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.shape[1] == self.width:
            return
        found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(
            f"tokens: expected packed text [total, {self.width}], got {found}; of padded text "
            "[pairs, length, width] make layout = fastvlp.ops.packing.TextLayout.from_mask(mask) "
            "and pass layout.pack(tokens)"
        )

    def _check_images(self, images: Tensor | None) -> None:
        if images is None and self.crossattention is not None:
            raise ValueError("images: expected the image tokens; a layer of text has cross=False")
        if images is not None and self.crossattention is None:
            raise ValueError("images: this layer has no cross-attention; make it with cross=True")

    def padded(
        self,
        tokens: Tensor,
        text_mask: Tensor,
        images: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        causal: bool = False,
        return_probs: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The layer's definition, on padded pairs.

        Every pair projects its image again and every padded token is computed.

        Args:
            tokens: [pairs, length, D].
            text_mask: bool [pairs, length], False for padding; what is returned there is arbitrary.
            images: [pairs, L, E], each pair's image.
            key_mask: bool [pairs, L].
            causal: as in `FusionLayer`.
            return_probs: also the cross-attention weights [pairs, heads, length, L].
        """
        self._check_images(images)
        if return_probs and (images is None or self.padded_attention == "sdpa"):
            raise ValueError("return_probs: expected cross-attention by eager matmuls")
        allowed = text_mask[:, None, None]
        if causal:
            length = tokens.shape[1]
            allowed = allowed & tokens.new_ones(length, length, dtype=torch.bool).tril()
        heads, _ = self._attend(self.attention.self, tokens, tokens, allowed)
        x, probs = self.attention.output(heads, tokens), None
        if images is not None:
            allowed = None if key_mask is None else key_mask[:, None, None]
            heads, probs = self._attend(self.crossattention.self, x, images, allowed)
            x = self.crossattention.output(heads, x)
        x = self._feed_forward(x)
        return (x, probs) if return_probs else x

    def _attend(self, project, x, source, allowed):
        q, k, v = (
            self._split(f(y)).transpose(1, 2)
            for f, y in ((project.query, x), (project.key, source), (project.value, source))
        )
        if self.padded_attention == "sdpa":
            p = self.attention_dropout if self.training else 0.0
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=p)
            return heads.transpose(1, 2).flatten(-2), None
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if allowed is not None:
            logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
        probs = F.dropout(logits.softmax(-1), self.attention_dropout, self.training)
        return (probs @ v).transpose(1, 2).flatten(-2), probs


class FusionLayer(_BertParameters):
    """A fusion layer on packed text whose pairs are grouped by image.

    Keys and values are projected once for each image, however many pairs use it.

    Examples:
        >>> import torch
        >>> from fastvlp.nn import FusionLayer
        >>> layer = FusionLayer(32, heads=4)
        >>> tokens, images = torch.randn(7, 32), torch.randn(2, 10, 32)
        >>> pairs = torch.tensor([0, 2, 4, 7])  # two of image 0, and one of image 1
        >>> rows = torch.tensor([0, 4, 7])
        >>> layer(tokens, pairs, images, rows).shape
        torch.Size([7, 32])
    """

    def project_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [.., heads, head_dim] of image tokens [.., E].

        `forward` takes them in place of the tokens, so that several calls can share them.
        """
        if self.crossattention is None:
            raise ValueError(
                "project_images: this layer has no cross-attention; make it with cross=True"
            )
        project = self.crossattention.self
        return self._split(project.key(images)), self._split(project.value(images))

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens_pairs: Tensor,
        images: Tensor | tuple[Tensor, Tensor] | None = None,
        cu_seqlens_images: Tensor | None = None,
        *,
        cu_seqlens_keys: Tensor | None = None,
        key_mask: Tensor | None = None,
        causal: bool = False,
        max_seqlen_pairs: int | None = None,
        max_seqlen_images: int | None = None,
        max_seqlen_keys: int | None = None,
        keep: KeptRows | None = None,
        return_probs: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One step; `fastvlp.ops.packing.PairLayout` has the arguments of the same names.

        Args:
            tokens: [total, D], the pairs of image 0 first, then those of image 1, ...
            cu_seqlens_pairs: int32 [pairs + 1], each pair's first row.
            images: [n, L, E], or packed [total keys, E], or `project_images` of either; with
                cross-attention only.
            cu_seqlens_images: int32 [n + 1], the first row of each image's pairs.
            cu_seqlens_keys: int32 [n + 1], for packed images.
            key_mask: bool [n, L] or [total keys], False for masked image tokens.
            causal: a token attends to its own pair up to itself only (text decoders).
            max_seqlen_pairs, max_seqlen_images, max_seqlen_keys: the longest pair, the most rows
                of an image, the most keys; where given nothing waits for the device to tell.
            keep: the rows to compute (`PairLayout.keep`), where nobody reads the others: all
                tokens are keys, these alone are queries. Not with `causal`.
            return_probs: also the cross-attention weights, part of the graph, for GradCAM.

        Returns:
            [total, D], with `keep` only its rows in the order of the layout, and with
            `return_probs` the weights [.., heads, most keys].

        Raises:
            ValueError: an argument is not as described, above all padded text in place of packed.
        """
        self._check_packed(tokens)
        self._check_images(images)
        if return_probs and images is None:
            raise ValueError("return_probs: expected cross-attention, this layer has none")
        if keep is not None and causal:
            raise ValueError("keep: expected None with causal, which counts rows from the last one")
        p = self.attention_dropout if self.training else 0.0
        project = self.attention.self
        queries, cu_seqlens_queries = tokens, cu_seqlens_pairs
        if keep is not None:
            queries, cu_seqlens_queries = keep.take(tokens), keep.cu_seqlens_pairs
            cu_seqlens_images = keep.cu_seqlens_images
        heads = cross_attention(
            self._split(project.query(queries)),
            self._split(project.key(tokens)),
            self._split(project.value(tokens)),
            cu_seqlens_queries,
            cu_seqlens_pairs,
            causal=causal,
            dropout_p=p,
            max_seqlen_q=max_seqlen_pairs,
            max_seqlen_k=max_seqlen_pairs,
        )
        x, probs = self.attention.output(heads.flatten(-2), queries), None
        if images is not None:
            keys = images if isinstance(images, tuple) else self.project_images(images)
            heads = cross_attention(
                self._split(self.crossattention.self.query(x)),
                *keys,
                cu_seqlens_images,
                cu_seqlens_keys,
                key_mask=key_mask,
                dropout_p=p,
                max_seqlen_q=max_seqlen_images,
                max_seqlen_k=max_seqlen_keys,
                return_probs=return_probs,
            )
            if return_probs:
                heads, probs = heads
            x = self.crossattention.output(heads.flatten(-2), x)
        first, second = self.intermediate["dense"], self.output.dense
        y = feed_forward(x, None, first.weight, first.bias, second.weight, second.bias)
        x = self.output.finish(y, x)
        return (x, probs) if return_probs else x


class PaddedFusionLayer(_BertParameters):
    """The definition of `FusionLayer`, with the same parameters, on padded pairs.

    What the public implementations do, and what the packed layer is measured against.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, Linear):
                module.reference = True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        """`padded`, with its arguments."""
        return self.padded(*args, **kwargs)


def load_bert_layer(layer: nn.Module, state: dict[str, Tensor], prefix: str = "") -> None:
    """Loads the weights of one BertLayer of transformers or ALBEF into a fusion layer.

    Names below the prefix, e.g. "text_encoder.bert.encoder.layer.6.", are the same:

        attention.self.{query,key,value}        attention.output.{dense,LayerNorm}
        crossattention.self.{query,key,value}   crossattention.output.{dense,LayerNorm}
        intermediate.dense                      output.{dense,LayerNorm}

    Raises:
        ValueError: names are missing or left over (a layer with cross-attention into one without),
            or shapes differ.
    """
    own = layer.state_dict()
    given = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"state: expected the weights of one layer under prefix {prefix!r}; "
            f"missing {missing}, unknown {unknown}"
        )
    for name, value in given.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"state: expected {name} of shape {tuple(own[name].shape)}, "
                f"got {tuple(value.shape)}"
            )
    layer.load_state_dict(given)


class _Attention(nn.Module):
    def __init__(self, width: int, key_width: int, dropout: float) -> None:
        super().__init__()
        self.self = _Projections(width, key_width)
        self.output = _Output(width, width, dropout)


class _Projections(nn.Module):
    def __init__(self, width: int, key_width: int) -> None:
        super().__init__()
        self.query = Linear(width, width)
        self.key = Linear(key_width, width)
        self.value = Linear(key_width, width)


class _Output(nn.Module):
    """LN(residual + dropout(dense(x)))"""

    def __init__(self, width: int, out: int, dropout: float) -> None:
        super().__init__()
        self.dense = Linear(width, out)
        self.LayerNorm = LayerNorm(out, EPS)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.finish(self.dense(x), residual)

    def finish(self, y: Tensor, residual: Tensor) -> Tensor:
        """What follows the matmul."""
        return self.LayerNorm(residual + self.dropout(y))
