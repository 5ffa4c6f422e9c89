"""Time of the momentum update and of AdamW with it, over 145 M parameters of ViT-B and BERT.

    python bench/ema.py --threads 2

Phases: `step` is the update alone, `step+copy` writes a bfloat16 copy as well, `adamw` is the
optimiser's step, the momentum update and bfloat16 copies of both weights.
"""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import report
import torch
from harness import OURS, Contender, Missing

from fastvlp import EmaModel
from fastvlp.optim import AdamWEma

OP, DECAY = "ema", 0.995
PHASES = ("step", "step+copy", "adamw")
ADAMW = {"lr": 1e-4, "weight_decay": 0.02}


def shapes(blocks: int) -> list[tuple[int, ...]]:
    """ViT-B/16 at 384 pixels and BERT's lower half with its embeddings, or fewer blocks of both."""
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,)]
    block += [(d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    layer = [(d, d), (d,)] * 4 + [(d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,), (d,), (d,)]
    ends = [(1, 1, d), (1, 577, d), (d, 3, 16, 16), (d,), (d,), (d,), (512, d), (2, d), (d,), (d,)]
    words = [(30522 - 9500, d)] if blocks == 12 else []
    return ends + words + block * blocks + layer * (blocks // 2)


class Weights(torch.nn.Module):
    """Parameters with nothing to compute."""

    def __init__(self, blocks: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.all = torch.nn.ParameterList(
            torch.randn(shape, generator=generator).mul_(0.02) for shape in shapes(blocks)
        )


@dataclass
class Inputs:
    model: Weights
    gradients: list[torch.Tensor]


def build(blocks: int, device: str, gradients: bool) -> Inputs:
    model = Weights(blocks).to(device)
    drawn = [p.detach() * 0.1 for p in model.parameters()] if gradients else []
    return Inputs(model, drawn)


@dataclass
class Tensors:
    weights: list[torch.Tensor]
    momentum: list[torch.Tensor]
    copies: list[torch.Tensor]


def tensors(inputs: Inputs, copies: bool) -> Tensors:
    weights = [p.detach() for p in inputs.model.parameters()]
    momentum = [p.mul(0.9) for p in weights]
    return Tensors(weights, momentum, [t.bfloat16() for t in momentum] if copies else [])


def ours(copies: bool, inputs: Inputs) -> Callable[[], None]:
    ema = EmaModel(inputs.model, DECAY, copy_dtype=torch.bfloat16 if copies else None)
    return ema.update


def foreach(copies: bool, inputs: Inputs) -> Callable[[], None]:
    t = tensors(inputs, copies)

    def call():
        torch._foreach_lerp_(t.momentum, t.weights, 1 - DECAY)
        if copies:
            torch._foreach_copy_(t.copies, t.momentum)

    return call


def albef(copies: bool, inputs: Inputs) -> Callable[[], None]:
    """The paper's loop: new storage for every momentum tensor."""
    t = tensors(inputs, copies)
    holders = [torch.nn.Parameter(m, requires_grad=False) for m in t.momentum]
    t.momentum.clear()

    def call():
        for holder, weight in zip(holders, t.weights, strict=True):
            holder.data = holder.data * DECAY + weight * (1.0 - DECAY)
        for copy, holder in zip(t.copies, holders, strict=False):
            copy.copy_(holder)

    return call


def averaged_model(inputs: Inputs) -> Callable[[], None]:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    ema = AveragedModel(inputs.model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    ema.update_parameters(inputs.model)  # the first one copies
    return lambda: ema.update_parameters(inputs.model)


def timm_ema(inputs: Inputs) -> Callable[[], None]:
    from timm.utils import ModelEmaV3

    ema = ModelEmaV3(inputs.model, DECAY, foreach=True)
    return lambda: ema.update(inputs.model)


def apex(inputs: Inputs) -> Callable[[], None]:
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    t = tensors(inputs, False)
    flag = torch.zeros(1, dtype=torch.int, device=t.weights[0].device)
    lists = [t.momentum, t.weights, t.momentum]
    return lambda: multi_tensor_applier(amp_C.multi_tensor_axpby, flag, lists, DECAY, 1 - DECAY, -1)


def with_gradients(inputs: Inputs) -> list[torch.nn.Parameter]:
    parameters = list(inputs.model.parameters())
    for p, g in zip(parameters, inputs.gradients, strict=True):
        p.grad = g
    return parameters


def our_adamw(inputs: Inputs) -> Callable[[], None]:
    parameters = with_gradients(inputs)
    low = Weights(0)
    low.all = torch.nn.ParameterList(
        torch.nn.Parameter(p.detach().bfloat16(), requires_grad=False) for p in parameters
    )
    ema = EmaModel(inputs.model, DECAY, copy_dtype=torch.bfloat16)
    return AdamWEma(parameters, **ADAMW, ema=ema, copy=low).step


def torch_adamw(options: dict[str, bool], inputs: Inputs) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(with_gradients(inputs), **ADAMW, **options)
    t = tensors(inputs, True)
    low = [w.bfloat16() for w in t.weights]

    def call():
        optimizer.step()
        torch._foreach_lerp_(t.momentum, t.weights, 1 - DECAY)
        torch._foreach_copy_(t.copies, t.momentum)
        torch._foreach_copy_(low, t.weights)

    return call


def contenders(phase: str) -> tuple[list[Contender], list[Missing]]:
    if phase == "adamw":
        return [
            Contender(OURS, our_adamw),
            Contender("fused + foreach", functools.partial(torch_adamw, {"fused": True})),
            Contender("foreach + foreach", functools.partial(torch_adamw, {"foreach": True})),
        ], []
    copies = phase == "step+copy"
    found = [
        Contender(OURS, functools.partial(ours, copies)),
        Contender("foreach", functools.partial(foreach, copies)),
        Contender("albef loop", functools.partial(albef, copies)),
    ]
    if copies:
        return found, []
    found.append(Contender("swa_utils", averaged_model))
    missing = []
    for name, module, make, remedy in (
        ("timm ModelEmaV3", "timm", timm_ema, "pip install timm"),
        ("apex axpby", "amp_C", apex, "build NVIDIA's apex from source; GPU only"),
    ):
        try:
            importlib.import_module(module)
            found.append(Contender(name, make))
        except ImportError:
            missing.append(Missing(name, f"{module} is not installed", remedy))
    return found, missing


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = harness.parser((__doc__ or "").splitlines()[0])
    flags.add_argument("--phase", choices=PHASES, nargs="+", default=list(PHASES))
    args = flags.parse_args(argv)
    report.require_plotting(args.plot)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    settings = harness.settings_from(args)
    blocks = 2 if args.quick else 12
    count = sum(torch.Size(shape).numel() for shape in shapes(blocks))
    rows: list[dict[str, Any]] = []
    missing: list[Missing] = []
    for phase in args.phase:
        entrants, absent = contenders(phase)
        make = functools.partial(build, device=args.device, gradients=phase == "adamw")
        found, failed = harness.compare(
            OP,
            entrants,
            functools.partial(make, blocks),
            functools.partial(make, 0),
            settings,
            dtype="fp32",
            shape={"parameters": count},
            phase=phase,
            measure_memory=False,  # what is written is the same for all
        )
        rows += found
        missing += absent + failed
    facts = report.meta(settings, ("timm",), missing)
    report.table(rows, rate=("parameters/s", "parameters"))
    report.print_missing(missing)
    print(summary(rows))
    if args.json:
        report.write_json(args.json, facts, rows)
    if args.plot:
        report.plot(args.plot, rows, facts, "parameters", "parameters")


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each phase: fastvlp against every other contender."""
    lines = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        group = [row for row in rows if row["phase"] == phase]
        mine = next(row for row in group if row["impl"] == OURS)
        others = ", ".join(
            f"{row['ms'] / mine['ms']:.2f}x as fast as {row['impl']}"
            for row in group
            if row is not mine
        )
        lines.append(f"{phase}: {OURS} {mine['ms']:.1f} ms, {others}.")
    return "\n".join(["", *lines])


if __name__ == "__main__":
    main()
