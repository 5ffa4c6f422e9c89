"""Time of the momentum update and of AdamW with it, over 145 M parameters of ViT-B and BERT.

    python bench/ema.py --threads 2

Phases: `step` is the update alone, `step+copy` writes a bfloat16 copy as well, `adamw` is the
optimiser's step, the momentum update and bfloat16 copies of both weights. The floor is a sum of two
vectors in place that moves as many bytes. Errors are those of the first update, its momentum (and
weights) against float64; peak memory is that of a later one, when all state exists.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _harness import measure
from _harness.measure import BOUND, OURS, Implementation, Missing
from _harness.run import Run

from fastvlp import EmaModel
from fastvlp.optim import AdamWEma

OP, DECAY = "ema", 0.995
PHASES = ("step", "step+copy", "adamw")
ADAMW = {"lr": 1e-4, "weight_decay": 0.02}
# Bytes for each parameter: the update reads two values and writes one, AdamW five and four; a copy
# takes two bytes.
BYTES = {"step": 12, "step+copy": 14, "adamw": 40}
FLOOR_PARTS = 4
NOTES = {"albef loop": "ALBEF's own update, a loop with new storage for each momentum tensor"}
# Errors are taken over every so many-th value of each tensor.
STRIDE = 7
# What a call leaves behind, by name: each a list of one tensor for each parameter.
Results = Mapping[str, Sequence[torch.Tensor]]


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
    found = [p.detach() * 0.1 for p in model.parameters()] if gradients else []
    return Inputs(model, found)


def start(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The momentum before the first update; not the weights, of which there is nothing to move."""
    return [w.detach().mul(0.9) for w in weights]


def restart(momentum: torch.nn.Module, model: torch.nn.Module) -> list[torch.Tensor]:
    """The parameters of `momentum`, holding the values of `start`."""
    found = [p.detach() for p in momentum.parameters()]
    torch._foreach_copy_(found, start(list(model.parameters())))
    return found


def picked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1)[::STRIDE] for t in tensors])


def unify(_: Inputs, results: Results) -> Mapping[str, torch.Tensor]:
    return {name: picked(tensors) for name, tensors in results.items()}


@dataclass
class Tensors:
    weights: list[torch.Tensor]
    momentum: list[torch.Tensor]
    copies: list[torch.Tensor]

    def results(self) -> Results:
        return {"momentum": self.momentum} | ({"copy": self.copies} if self.copies else {})


def tensors(model: torch.nn.Module, copies: bool) -> Tensors:
    weights = [p.detach() for p in model.parameters()]
    momentum = start(weights)
    return Tensors(weights, momentum, [t.bfloat16() for t in momentum] if copies else [])


def ours(copies: bool, inputs: Inputs) -> Callable[[], Results]:
    ema = EmaModel(inputs.model, DECAY, copy_dtype=torch.bfloat16 if copies else None)
    results = {"momentum": restart(ema.module, inputs.model)}
    if copies:
        results["copy"] = list(ema.copy.parameters())

    def call():
        ema.update()
        return results

    return call


def foreach(copies: bool, inputs: Inputs) -> Callable[[], Results]:
    t = tensors(inputs.model, copies)
    results = t.results()

    def call():
        torch._foreach_lerp_(t.momentum, t.weights, 1 - DECAY)
        if copies:
            torch._foreach_copy_(t.copies, t.momentum)
        return results

    return call


def albef(copies: bool, inputs: Inputs) -> Callable[[], Results]:
    """The paper's loop: new storage for every momentum tensor."""
    t = tensors(inputs.model, copies)
    holders = [torch.nn.Parameter(m, requires_grad=False) for m in t.momentum]
    t.momentum.clear()
    results = t.results() | {"momentum": holders}

    def call():
        for holder, weight in zip(holders, t.weights, strict=True):
            holder.data = holder.data * DECAY + weight * (1.0 - DECAY)
        for copy_, holder in zip(t.copies, holders, strict=False):
            copy_.copy_(holder)
        return results

    return call


def averaged_model(inputs: Inputs) -> Callable[[], Results]:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    ema = AveragedModel(inputs.model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    ema.update_parameters(inputs.model)  # the first one copies
    results = {"momentum": restart(ema.module, inputs.model)}

    def call():
        ema.update_parameters(inputs.model)
        return results

    return call


def timm_ema(inputs: Inputs) -> Callable[[], Results]:
    from timm.utils import ModelEmaV3

    ema = ModelEmaV3(inputs.model, DECAY, foreach=True)
    results = {"momentum": restart(ema.module, inputs.model)}

    def call():
        ema.update(inputs.model)
        return results

    return call


def apex(inputs: Inputs) -> Callable[[], Results]:
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    t = tensors(inputs.model, False)
    flag = torch.zeros(1, dtype=torch.int, device=t.weights[0].device)
    lists = [t.momentum, t.weights, t.momentum]
    results = t.results()

    def call():
        multi_tensor_applier(amp_C.multi_tensor_axpby, flag, lists, DECAY, 1 - DECAY, -1)
        return results

    return call


def with_gradients(inputs: Inputs) -> Weights:
    """A model of its own, since a step changes the weights."""
    model = copy.deepcopy(inputs.model)
    for p, g in zip(model.parameters(), inputs.gradients, strict=True):
        p.grad = g
    return model


def our_adamw(inputs: Inputs) -> Callable[[], Results]:
    model = with_gradients(inputs)
    low = Weights(0)
    low.all = torch.nn.ParameterList(
        torch.nn.Parameter(p.detach().bfloat16(), requires_grad=False) for p in model.parameters()
    )
    ema = EmaModel(model, DECAY, copy_dtype=torch.bfloat16)
    optimizer = AdamWEma(model.parameters(), **ADAMW, ema=ema, copy=low)
    results = {
        "momentum": restart(ema.module, model),
        "copy": list(ema.copy.parameters()),
        "weights": list(model.parameters()),
        "low": list(low.parameters()),
    }

    def call():
        optimizer.step()
        return results

    return call


def torch_adamw(options: dict[str, bool], inputs: Inputs) -> Callable[[], Results]:
    model = with_gradients(inputs)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, **options)
    t = tensors(model, True)
    low = [w.bfloat16() for w in t.weights]
    results = t.results() | {"weights": t.weights, "low": low}

    def call():
        optimizer.step()
        torch._foreach_lerp_(t.momentum, t.weights, 1 - DECAY)
        torch._foreach_copy_(t.copies, t.momentum)
        torch._foreach_copy_(low, t.weights)
        return results

    return call


def traffic(bytes_each: int, inputs: Inputs) -> Callable[[], None]:
    weights = list(inputs.model.parameters())
    count = sum(p.numel() for p in weights) * bytes_each // BYTES["step"]
    # A part at a time, still far larger than any cache: AdamW's bytes at once are 4 GB.
    total, added = torch.zeros(2, -(-count // FLOOR_PARTS), device=weights[0].device)

    def call() -> None:
        for _ in range(FLOOR_PARTS):
            total.add_(added)

    return call


def float64(phase: str, inputs: Inputs) -> Mapping[str, torch.Tensor]:
    """The first update in float64, at the values that `picked` picks."""
    weights = list(inputs.model.parameters())
    momentum = picked(start(weights)).double()
    weight = torch.nn.Parameter(picked(weights).double())
    if phase == "adamw":
        weight.grad = picked(inputs.gradients).double()
        torch.optim.AdamW([weight], **ADAMW).step()
    weight = weight.detach()
    momentum.lerp_(weight, 1 - DECAY)
    found = {"momentum": momentum}
    if phase != "step":
        found["copy"] = momentum
    if phase == "adamw":
        found |= {"weights": weight, "low": weight}
    return found


def implementations(phase: str) -> tuple[list[Implementation], list[Missing]]:
    """Ours, the bound and every peer that can run here; and those that cannot, with reasons."""
    copies = phase == "step+copy"
    makes: dict[str, Callable[[Inputs], Callable[[], Results]]] = {
        OURS: functools.partial(ours, copies),
        "foreach": functools.partial(foreach, copies),
        "albef loop": functools.partial(albef, copies),
    }
    missing = []
    if phase == "adamw":
        makes = {
            OURS: our_adamw,
            "fused + foreach": functools.partial(torch_adamw, {"fused": True}),
            "foreach + foreach": functools.partial(torch_adamw, {"foreach": True}),
        }
    elif phase == "step":
        makes["swa_utils"] = averaged_model
        for name, module, make, remedy in (
            ("timm ModelEmaV3", "timm", timm_ema, "pip install timm"),
            ("apex axpby", "amp_C", apex, "build NVIDIA's apex from source; GPU only"),
        ):
            try:
                importlib.import_module(module)
                makes[name] = make
            except ImportError:
                missing.append(Missing(name, f"{module} is not installed", remedy))
    found = [
        Implementation(name, make, unify=unify, note=NOTES.get(name, ""))
        for name, make in makes.items()
    ]
    bound = Implementation(
        BOUND,
        functools.partial(traffic, BYTES[phase]),
        bound=True,
        note=f"a sum in place that moves the same {BYTES[phase]} bytes for each parameter",
    )
    return [found[0], bound, *found[1:]], missing


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    flags = measure.parser(__doc__)
    flags.add_argument("--phase", choices=PHASES, nargs="+", default=list(PHASES))
    flags.add_argument("--blocks", type=int, help="of 12, of the image's model (2 if quick)")
    measure.add_omissions(flags, compiled=False)
    args = flags.parse_args(argv)
    if args.blocks is None:
        args.blocks = 2 if args.quick else 12
    if not 0 <= args.blocks <= 12:
        flags.error("--blocks: expected 0 to 12")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    count = sum(torch.Size(shape).numel() for shape in shapes(args.blocks))
    with Run(
        args,
        ("timm",),
        axis=("parameters", "parameters"),
        rate=("parameters/s", "parameters"),
        summary=summary,
    ) as run:
        for phase in args.phase:
            entrants, absent = implementations(phase)
            make = functools.partial(build, device=args.device, gradients=phase == "adamw")
            run.compare(
                OP,
                entrants,
                functools.partial(make, args.blocks),
                functools.partial(make, 0),
                missing=absent,
                dtype="fp32",
                shape={"parameters": count},
                phase=phase,
                reference=functools.partial(float64, phase),
                judged=("momentum", "weights"),
                warm_memory=True,
            )


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each phase: fastvlp against every baseline."""
    lines = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        group = [row for row in rows if row["phase"] == phase]
        mine = next(row for row in group if row["impl"] == OURS)
        parts = [f"{OURS} {mine['ms']:.1f} ms"]
        for row in group:
            if row["impl"] == BOUND:
                parts.append(f"{row['ms'] / mine['ms']:.0%} of the floor's speed")
            elif row is not mine:
                parts.append(f"{row['ms'] / mine['ms']:.2f}x as fast as {row['impl']}")
        lines.append(f"{phase}: {', '.join(parts)}.")
    return "\n".join(["", *lines])


if __name__ == "__main__":
    main()
