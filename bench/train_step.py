"""One training step: forward, backward, optimiser, momentum and queue, against plain PyTorch.

    python bench/train_step.py --threads 2

`fastvlp` is the kernels' form with AdamWEma, `fastvlp, bf16 momentum` the same with the momentum
forward by a bfloat16 copy. The reference has the same weights in the padded formulation, by eager
attention or SDPA, with torch's fused AdamW and a foreach momentum update. Dropout is on, as in
training. `error` is that of the losses without dropout before the first step against the reference
in float64; peak memory is that of a later step, above weights and optimiser state.

A model is an adapter: a module of _train_step with `build`, `draw`, `attention_layers`, `losses`,
`timed_parts`, `work` and `shape`, as _train_step/albef.py has, and with the forms it knows: the
`ATTENTIONS` of its plain form, and whether it has a `MOMENTUM` encoder.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _harness import measure, report
from _harness.measure import OURS, Implementation
from _harness.run import Run
from _harness.table import Column, print_grid

from fastvlp.optim import AdamWEma

MODELS = ("clip", "vilt", "albef")
ADAMW = {"lr": 1e-4, "weight_decay": 0.02}
LOW = f"{OURS}, bf16 momentum"


@dataclass(frozen=True)
class Case:
    """What is trained: an adapter's name, the model's size, pairs, and whether texts are full."""

    model: str
    size: str
    batch: int
    full: bool

    @property
    def adapter(self) -> Any:
        return importlib.import_module(f"_train_step.{self.model}")

    def draw(self) -> Any:
        return self.adapter.draw(self.size, self.batch, self.full)

    def op(self) -> str:
        return f"{self.model} step, {'full' if self.full else 'random'} lengths"


@dataclass
class Inputs:
    case: Case
    batch: Any


def build(case: Case) -> Inputs:
    return Inputs(case, case.draw())


def use(adapter: Any, model: torch.nn.Module, attention: str | None) -> None:
    """The kernels' form, or the plain one with this attention."""
    model.use_reference(attention is not None)
    for layer in adapter.attention_layers(model):
        layer.padded_attention = (attention or "eager").lower()


class Step:
    """A model with its optimiser; each call is one step. `marks` are the times of the last one."""

    def __init__(self, attention: str | None, momentum_copy: str | None, inputs: Inputs) -> None:
        self.adapter, self.batch = inputs.case.adapter, inputs.batch
        self.model = self.adapter.build(inputs.case.size, momentum_copy)
        use(self.adapter, self.model, attention)
        self.before = self._losses_without_dropout()
        self.model.train()
        ema = self.model.momentum if self.adapter.MOMENTUM else None
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.foreach: tuple[list, list] = ([], [])
        if attention is None:
            self.optimizer = AdamWEma(trained, **ADAMW, ema=ema)
        else:
            self.optimizer = torch.optim.AdamW(trained, **ADAMW, fused=True)
            if ema is not None:
                pairs = list(ema._tensors.unique())
                self.foreach = [p.detach() for p, _ in pairs], [m for _, m in pairs]
                self.weight = 1 - ema.current_decay()

    def _losses_without_dropout(self) -> dict[str, torch.Tensor]:
        self.model.eval()
        with torch.no_grad():
            return {k: v.clone() for k, v in self._losses(update=False).items()}

    def _losses(self, update: bool) -> Mapping[str, torch.Tensor]:
        return self.adapter.losses(self.model, self.batch, update)

    def __call__(self) -> dict[str, torch.Tensor]:
        self.marks = [time.perf_counter()]
        total = self._losses(update=True)["total"]
        self.marks.append(time.perf_counter())
        total.backward()
        self.marks.append(time.perf_counter())
        self.optimizer.step()
        if self.foreach[0]:
            torch._foreach_lerp_(self.foreach[1], self.foreach[0], self.weight)
        self.optimizer.zero_grad()
        self.marks.append(time.perf_counter())
        return self.before


def reference_losses(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Without dropout in float64, by the plain form."""
    adapter = inputs.case.adapter
    model = adapter.build(inputs.case.size, None).double().eval()
    use(adapter, model, adapter.ATTENTIONS[0])
    with torch.no_grad():
        return adapter.losses(model, _double(inputs.batch), False)


def _double(batch: Any) -> Any:
    wide = {
        name: value.double() if value.is_floating_point() else value
        for name, value in vars(batch).items()
    }
    return type(batch)(**wide)


# By name: the attention of the plain form or None for the kernels, and the momentum copy's dtype.
FORMS: dict[str, tuple[str | None, str | None]] = {
    OURS: (None, None),
    LOW: (None, "bfloat16"),
    "reference, eager": ("eager", None),
    "reference, SDPA": ("SDPA", None),
}


def forms(adapter: Any) -> dict[str, tuple[str | None, str | None]]:
    """Those that a model knows."""
    return {
        name: (attention, copy)
        for name, (attention, copy) in FORMS.items()
        if attention in (None, *adapter.ATTENTIONS) and (copy is None or adapter.MOMENTUM)
    }


def implementations(adapter: Any) -> list[Implementation]:
    return [
        Implementation(name, functools.partial(Step, *form))
        for name, form in forms(adapter).items()
    ]


def parts(form: tuple[str | None, str | None], inputs: Inputs, rounds: int) -> dict[str, float]:
    """Median milliseconds of each part of a step; what no part claims is "objectives"."""
    step = Step(*form, inputs)
    spent: dict[str, float] = defaultdict(float)
    for name, owner, methods in step.adapter.timed_parts(step.model):
        for method in methods:
            setattr(owner, method, _clocked(getattr(owner, method), name, spent))
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds + 1):
        spent.clear()
        step()
        start, forward, backward, end = step.marks
        each = dict(spent) | {"objectives": forward - start - sum(spent.values())}
        each |= {"backward": backward - forward, "optimiser, momentum": end - backward}
        for name, value in each.items():
            found[name].append(value * 1e3)
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def _clocked(method: Callable, name: str, spent: dict[str, float]) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = method(*args, **kwargs)
        spent[name] += time.perf_counter() - start
        return result

    return run


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = measure.parser(__doc__)
    flags.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    flags.add_argument("--batch", type=int, help="pairs of a step (16; 4 if quick)")
    flags.add_argument(
        "--lengths", choices=("random", "full"), nargs="+", default=["random", "full"]
    )
    flags.add_argument("--form", choices=list(FORMS), nargs="+", default=list(FORMS))
    flags.add_argument("--parts", type=int, default=3, help="rounds of the table of parts; 0: none")
    measure.add_omissions(flags, compiled=False)
    args = flags.parse_args(argv)
    if args.batch is None:
        args.batch = 4 if args.quick else 16
    if args.batch < 1 or args.parts < 0:
        flags.error("--batch must be positive, --parts not negative")
    if args.device != "cpu":
        flags.error("--device: the table of parts and the reference are for the CPU")
    if OURS not in args.form:
        flags.error(f"--form: expected {OURS} among them")
    return args


def measure_case(case: Case, args: argparse.Namespace, run: Run) -> None:
    """The rows of every form, and its parts."""
    chosen = [each for each in implementations(case.adapter) if each.name in args.form]
    inputs = build(case)
    run.compare(
        case.op(),
        chosen,
        functools.partial(build, case),
        functools.partial(build, Case(case.model, "tiny", 2, True)),
        dtype="fp32",
        shape=case.adapter.shape(case.size, inputs.batch),
        phase="step",
        reference=reference_losses,
        judged=("total",),
        warm_memory=True,
    )
    table = {}
    for name in [each.name for each in chosen] if args.parts else ():
        form = FORMS[name]
        table[name] = {
            "ms": parts(form, inputs, args.parts),
            "gflop": case.adapter.work(case.size, inputs.batch, packed=form[0] is None),
        }
    found = {"op": case.op(), "parts": table}
    run.facts["parts"].append(found)
    if table:
        print_parts(found)
        run.print("")


def print_parts(found: Mapping[str, Any]) -> None:
    """A table of GFLOP and milliseconds for each part and form."""
    names = list(dict.fromkeys(name for each in found["parts"].values() for name in each["ms"]))
    columns = []
    for form, each in found["parts"].items():
        work = [each["gflop"].get(name) for name in names]
        columns += [
            Column(f"{form}, GFLOP", ["" if value is None else f"{value:.1f}" for value in work]),
            Column("ms", [f"{each['ms'][name]:.0f}" for name in names]),
        ]
    print_grid(f"{found['op']}: GFLOP and ms of each part", Column("part", names), columns)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    size = "tiny" if args.quick else "small"
    axis = ("tokens", "tokens")
    with Run(args, axis=axis, summary=summary, facts={"parts": []}) as run:
        for model, lengths in itertools.product(args.model, args.lengths):
            measure_case(Case(model, size, args.batch, lengths == "full"), args, run)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """For each comparison fastvlp's forms against the faster of the references."""
    lines = [""]
    for group in report.groups(rows):
        plain = [row for row in group if row["impl"].startswith("reference")]
        best = min(plain, key=lambda row: row["ms"], default=None)
        for row in group:
            if row in plain:
                continue
            parts_ = [f"{row['impl']} {row['ms']:.0f} ms"]
            if best:
                parts_.append(f"{best['ms'] / row['ms']:.2f}x as fast as {best['impl']}")
                if row["peak_mb"] and best["peak_mb"]:
                    parts_.append(f"{row['peak_mb'] / best['peak_mb']:.2f} of its peak memory")
            lines.append(f"{row['op']}: {', '.join(parts_)}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
