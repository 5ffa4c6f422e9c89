"""ALBEF's task: contrast with a momentum encoder and a queue, matching, masked language
modelling."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastvlp.data.text import BertTokenizer
from fastvlp.models import albef, base
from fastvlp.train.parallel import Ranks
from fastvlp.train.tasks.albef_retrieval import retrieval_scores
from fastvlp.train.tasks.base import Task
from fastvlp.train.tasks.data import split_pairs


class AlbefTask(Task):
    """Pretrains an `Albef` and evaluates it by retrieval, contrastive and re-ranked.

    The momentum encoder and the queues are in the model, and so in its checkpoints. The optimiser
    moves the momentum encoder in one pass with the weights: what the paper does before a step's
    forward pass is done after the step before. Features enter the queues after the step, so that
    one that is skipped leaves them as they were. In chunks, each contrasts with its own pairs and
    the queue, as each rank does.

    Args:
        model: made with `pretraining`; with `queue_ids` pairs of equal id match one another.
        tokenizer: of the captions; the loaders' tokenizer masks what it gives.
        ranks: the processes of the run.
        held_out: loaders of held-out pairs by name, not shuffled, with plain texts.
        chunk_size: pairs that go through the model at a time.
        alpha: weight of the momentum encoder's targets.
        alpha_steps: steps over which it is warmed up from 0.
        candidates: of re-ranking, for each query.
    """

    def __init__(
        self,
        model: albef.Albef,
        tokenizer: BertTokenizer,
        ranks: Ranks,
        *,
        held_out: dict[str, Any] | None = None,
        chunk_size: int | None = None,
        alpha: float = 0.4,
        alpha_steps: int = 1,
        candidates: int = 32,
        reference: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.ranks = model, tokenizer, ranks
        self.held_out, self.chunk_size = held_out or {}, chunk_size
        self.alpha, self.alpha_steps, self.candidates = alpha, alpha_steps, candidates
        self.momentum = model.momentum
        # Of the passes of the present step, for the queues.
        self.features: list[albef.MomentumFeatures] = []
        model.queue.group = ranks.group
        model.use_reference(reference)

    def losses(self, model: nn.Module, batch) -> dict[str, Tensor]:
        text = batch.tokens
        losses, features = model(
            batch.images,
            text.ids,
            text.mask,
            text.masked_ids,
            text.labels,
            self.present_alpha(),
            ids=batch.ids.to(batch.images.device) if self.model.config.queue_ids else None,
            return_features=True,
        )
        self.features.append(features)
        total, itc, itm, mlm = losses
        return {"loss": total, "itc_loss": itc, "itm_loss": itm, "mlm_loss": mlm}

    def backward(
        self, model: nn.Module, batch: Any, scale: float = 1.0, sizes: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        self.features = []
        return super().backward(model, batch, scale, sizes)

    def after_step(self) -> None:
        self.model.enqueue(self.features)

    def present_alpha(self) -> float:
        """Alpha of the next step."""
        return self.alpha * min(1.0, self.momentum.num_updates / self.alpha_steps)

    def split(self, batch: Any, rows: int, least: int = 1) -> Iterable[tuple[Any, float]]:
        return split_pairs(batch, rows, least)

    def uses_weight_decay(self, name: str, parameter: nn.Parameter) -> bool:
        # Everything but biases and norms, so the temperature too.
        return parameter.ndim != 1

    def blocks(self) -> list[nn.Module]:
        student = self.model.student
        return [*student.visual_encoder.blocks, *student.text_encoder.bert["encoder"]["layer"]]

    def metrics(self) -> dict[str, float]:
        return {"temperature": self.model.temp.item(), "alpha": self.present_alpha()}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Recalls in both directions for each held-out set, contrastive and re-ranked."""
        scores = {}
        for name, loader in self.held_out.items():
            found = retrieval_scores(model, self.tokenizer, loader, self.candidates, self.ranks)
            scores |= {f"{name}/{key}": v for key, v in found.items() if "/R@" in key}
        return scores

    def save_tokenizer(self, folder: Path) -> None:
        self.tokenizer.save(folder / "vocab.txt")

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes model.safetensors, model.json and vocab.txt: the model without momentum encoder
        and queues."""
        config = dataclasses.replace(model.config, pretraining=False)
        plain, state = albef.Albef(config), model.state_dict()
        plain.load_state_dict({name: state[name] for name in plain.state_dict()})
        base.save(plain, folder / "model")
        self.save_tokenizer(folder)
