"""The comparisons of gpu_check.py: every operator at its sizes, dtypes and phases, with its peers.

Each knows the arithmetic and the traffic that no implementation can do without, so that its times
can be held against what the device was measured to do. Matmuls are counted once where they could
be kept; elementwise work is not counted.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ema
import momentum_contrastive
import soft_cross_entropy
import torch
import word_patch_alignment
from _harness.measure import BOUND, DTYPES, OURS, Implementation, Missing
from baselines.contrastive import features, softmax
from baselines.contrastive import sigmoid as sigmoid_peers
from baselines.cross_attention import attention
from baselines.cross_attention import inputs as attention_inputs
from baselines.word_patch_alignment import peers

PHASES = ("fwd", "fwd+bwd")
WIDTH = 512  # of CLIP's features
LARGE_N = (8192, 32768, 65536)

OTHERS = ("fp32", "fp16")
# Its loop of 50 iterations compiles for a minute.
SLOW_TO_COMPILE = ("word_patch_alignment",)
# float64 takes this many rows at most where a reference goes through them one image at a time.
REFERENCE_IMAGES = 300


def _phases(quick: bool) -> tuple[str, ...]:
    return PHASES[1:] if quick else PHASES


@dataclass(frozen=True)
class Comparison:
    """One table: an operator's implementations on the same inputs.

    flops, bytes: what cannot be done without.
    reference: float64 results of `build()`, or None where that takes too long.
    """

    op: str
    dtype: str
    shape: Mapping[str, int]
    phase: str
    implementations: Sequence[Implementation]
    build: Callable[[], Any]
    tiny: Callable[[], Any]
    reference: Callable[[Any], Mapping[str, Any]] | None
    flops: float
    bytes: float
    judged: Sequence[str] | None = None
    missing: Sequence[Missing] = ()

    @property
    def name(self) -> str:
        sizes = ", ".join(f"{key} {value}" for key, value in self.shape.items())
        return f"{self.op} {self.phase} {self.dtype}, {sizes}"


def comparisons(quick: bool) -> list[Comparison]:
    """Every comparison, what matters most first.

    bfloat16 without torch.compile, whose peers follow: they take seconds each to compile, so each
    operator has them at its first size only. Then float32 and float16.
    """
    found = [
        *_in_turn([*(kind("bf16", quick) for kind in KINDS), updates(quick)]),
        *([] if quick else _in_turn([kind(dtype, False) for kind in KINDS for dtype in OTHERS])),
    ]
    plain = [replace(each, implementations=uncompiled(each)) for each in found]
    first = {each.op: each for each in reversed(found) if each.phase == PHASES[1]}
    late = [
        replace(each, implementations=[c for c in each.implementations if c.compiled], missing=())
        for each in first.values()
        if each.op not in SLOW_TO_COMPILE and each.dtype == "bf16" and not quick
    ]
    split = sum(each.dtype == "bf16" or each.op in ("ema", "adamw_ema") for each in plain)
    return [*plain[:split], *(each for each in late if each.implementations), *plain[split:]]


def uncompiled(comparison: Comparison) -> list[Implementation]:
    return [each for each in comparison.implementations if not each.compiled]


def _in_turn(lists: Sequence[Iterable[Comparison]]) -> Iterator[Comparison]:
    """One comparison of each list, then the next of each."""
    for row in itertools.zip_longest(*lists):
        yield from (found for found in row if found is not None)


def contrastive(dtype: str, quick: bool) -> Iterator[Comparison]:
    element = DTYPES[dtype].itemsize
    for n, phase in itertools.product((128,) if quick else LARGE_N, _phases(quick)):
        found, absent = softmax.implementations(dtype, "cuda")
        make = functools.partial(softmax.forward_backward, softmax.transformers_clip)
        found.append(Implementation("transformers", make))
        if phase == "fwd":
            found = [_forward_only(each) for each in found if not each.bound]
            found = [each for each in found if each is not None]
        build = functools.partial(_features, WIDTH, dtype)
        yield Comparison(
            "contrastive", dtype, {"n": n, "d": WIDTH}, phase, found,
            functools.partial(build, n), functools.partial(build, 64),
            functools.partial(_contrastive_reference, phase),
            flops=(2 if phase == "fwd" else 6) * n * n * WIDTH,
            bytes=(2 if phase == "fwd" else 4) * n * WIDTH * element,
            judged=("loss",) if phase == "fwd" else softmax.JUDGED, missing=absent,
        )  # fmt: skip


def _forward_only(implementation: Implementation) -> Implementation | None:
    """The implementation of the loss alone; None where its loss cannot be had alone."""
    make = implementation.make
    if make.func is not softmax.forward_backward:
        return None
    return Implementation(
        implementation.name, functools.partial(softmax.forward, *make.args),
        compiled=implementation.compiled, extra=implementation.extra,
    )  # fmt: skip


def _features(dim: int, dtype: str, n: int) -> softmax.Inputs:
    image, text = features.pairs(features.RANDOM, n, dim)
    kind = DTYPES[dtype]
    scale = torch.tensor(100.0, device="cuda")
    return softmax.Inputs(image.to("cuda", kind), text.to("cuda", kind), scale)


def _contrastive_reference(phase: str, inputs: softmax.Inputs) -> Mapping[str, Any]:
    found = softmax.float64_reference(inputs)
    return {"loss": found["loss"]} if phase == "fwd" else found


def sigmoid(dtype: str, quick: bool) -> Iterator[Comparison]:
    element = DTYPES[dtype].itemsize
    for n, phase in itertools.product((128,) if quick else LARGE_N, _phases(quick)):
        backward = phase != "fwd"
        build = functools.partial(sigmoid_peers.draw, dim=WIDTH, dtype=dtype, device="cuda")
        yield Comparison(
            "sigmoid_contrastive", dtype, {"n": n, "d": WIDTH}, phase,
            sigmoid_peers.implementations(dtype, "cuda", backward),
            functools.partial(build, n), functools.partial(build, 64),
            functools.partial(sigmoid_peers.float64_reference, backward),
            flops=(6 if backward else 2) * n * n * WIDTH,
            bytes=(4 if backward else 2) * n * WIDTH * element,
            judged=sigmoid_peers.JUDGED if backward else ("loss",),
        )  # fmt: skip


def momentum(dtype: str, quick: bool) -> Iterator[Comparison]:
    batch, dim = 64, 256
    element = DTYPES[dtype].itemsize
    for queue, phase in itertools.product(
        (512,) if quick else (65536, 32768, 8192), _phases(quick)
    ):
        backward = phase != "fwd"
        build = functools.partial(momentum_contrastive.inputs, dim=dim, dtype=dtype, device="cuda")
        keys = queue + batch
        yield Comparison(
            "momentum_contrastive", dtype, {"b": batch, "q": queue, "d": dim}, phase,
            momentum_contrastive.implementations(dtype, True, backward),
            functools.partial(build, batch, queue), functools.partial(build, 4, 64),
            functools.partial(_momentum_reference, backward),
            # Student and teacher against all keys, and the student's gradient; both directions.
            flops=2 * (6 if backward else 4) * batch * keys * dim,
            bytes=2 * keys * dim * element,
        )  # fmt: skip


def _momentum_reference(backward: bool, inputs: Any) -> Mapping[str, Any]:
    found = momentum_contrastive.float64(inputs)
    return found if backward else {"loss": found["loss"]}


def cross_attention(dtype: str, quick: bool) -> Iterator[Comparison]:
    case = functools.partial(attention_inputs.Case, dtype=dtype, device="cuda")
    cases = [case(), case(queries=120), case("self", images=256)]
    # 8k, 32k and 65k rows of text.
    cases += [case(images=-(-n // 30)) for n in LARGE_N]
    if quick:
        cases = [case(images=2, heads=2, keys=40)]
    for each, phase in itertools.product(cases, _phases(quick)):
        backward = phase != "fwd"
        found, absent = attention.implementations(each, backward)
        work = _attention_work(each)
        small = each.images <= REFERENCE_IMAGES
        reference = functools.partial(attention_inputs.float64_reference, backward)
        yield Comparison(
            each.op(), dtype, each.shape(), phase, found,
            functools.partial(attention_inputs.draw, each),
            functools.partial(attention_inputs.draw, each.tiny()),
            reference if small else None,
            flops=(6 if backward else 2) * 1e9 * work["gflop_per_matmul"],
            bytes=1e6 * work["mb_forward_backward" if backward else "mb_forward"],
            missing=absent,
        )  # fmt: skip


def _attention_work(case: attention_inputs.Case) -> Mapping[str, float]:
    """The arithmetic and traffic of the inputs that `draw` would draw."""
    lengths = attention_inputs.query_lengths(
        case, torch.Generator().manual_seed(attention_inputs.SEED)
    )
    keys = lengths if case.part == "self" else [case.keys] * case.images
    element = DTYPES[case.dtype].itemsize
    return attention_inputs.work_of(lengths, keys, case.heads, case.dim, element)


def soft(dtype: str, quick: bool) -> Iterator[Comparison]:
    width, vocabulary = (64, 500) if quick else (768, 30522)
    for rows, teacher, phase in itertools.product(
        (40,) if quick else (1000, 8192, 32768),
        (False,) if quick else (True, False),
        _phases(quick),
    ):
        backward = phase != "fwd"
        found, absent = soft_cross_entropy.implementations(dtype, "cuda", teacher, True)
        if not backward:
            found = [_loss_alone(each) for each in found if not each.bound]
        build = functools.partial(soft_cross_entropy.draw, width=width, dtype=dtype, device="cuda")
        heads = 1 + teacher
        weights = 4 * vocabulary * (width + 1) * (heads + backward)
        yield Comparison(
            "soft_cross_entropy", dtype,
            {"m": rows, "d": width, "v": vocabulary, "teacher": teacher}, phase, found,
            functools.partial(build, rows, vocabulary=vocabulary),
            functools.partial(build, 8, vocabulary=64),
            functools.partial(_soft_reference, teacher, backward) if rows <= 8192 else None,
            flops=2 * (heads + 2 * backward) * rows * width * vocabulary,
            bytes=weights + DTYPES[dtype].itemsize * rows * width * (heads + backward),
            missing=absent,
        )  # fmt: skip


def _loss_alone(implementation: Implementation) -> Implementation:
    make = functools.partial(implementation.make, backward=False)
    return Implementation(
        implementation.name, make, compiled=implementation.compiled, note=implementation.note
    )


def _soft_reference(teacher: bool, backward: bool, inputs: Any) -> Mapping[str, Any]:
    found = soft_cross_entropy.float64_reference(teacher, inputs)
    return found if backward else {"loss": found["loss"]}


def word_patch(dtype: str, quick: bool) -> Iterator[Comparison]:
    words, patches, dim = (8, 16, 64) if quick else (40, 200, 768)
    # The README's 64 pairs, then 8k, 32k and 65k words.
    for pairs, phase in itertools.product(
        (2,) if quick else (64, *(-(-n // words) for n in LARGE_N)), _phases(quick)
    ):
        backward = phase != "fwd"
        args = argparse.Namespace(pairs=pairs, words=words, patches=patches, dim=dim, device="cuda")
        build = functools.partial(word_patch_alignment.inputs, args, dtype, "full")
        judged = word_patch_alignment.JUDGED[phase]
        tokens = pairs * (words + patches) * dim * DTYPES[dtype].itemsize
        yield Comparison(
            "word_patch_alignment", dtype, word_patch_alignment.shape(args, "full"), phase,
            peers.implementations(phase),
            build, functools.partial(build, pairs=1),
            functools.partial(word_patch_alignment.reference, judged) if pairs <= 512 else None,
            flops=2 * (3 if backward else 1) * pairs * words * patches * dim,
            bytes=tokens * (2 if backward else 1),
            judged=judged,
        )  # fmt: skip


def updates(quick: bool) -> Iterator[Comparison]:
    """The momentum update, with a copy, and AdamW with it; parameters are float32."""
    blocks = 0 if quick else 12
    count = sum(torch.Size(shape).numel() for shape in ema.shapes(blocks))
    for phase in ema.PHASES[::2] if quick else ema.PHASES:
        found, absent = ema.implementations(phase)
        build = functools.partial(ema.build, device="cuda", gradients=phase == "adamw")
        yield Comparison(
            "adamw_ema" if phase == "adamw" else "ema", "fp32", {"parameters": count}, phase,
            found, functools.partial(build, blocks), functools.partial(build, 0),
            functools.partial(ema.float64, phase),
            flops=0.0, bytes=ema.BYTES[phase] * count,
            judged=("momentum", "weights"), missing=absent,
        )  # fmt: skip


KINDS = (contrastive, sigmoid, momentum, cross_attention, soft, word_patch)


def floor_row(comparison: Comparison, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """The least time by the measured rates, as a bound among the comparison's rows."""
    arithmetic = comparison.flops / (ceilings[f"matmul_{comparison.dtype}_tflop_s"] * 1e9)
    traffic = comparison.bytes / (ceilings["copy_gb_s"] * 1e6)
    which = "arithmetic" if arithmetic > traffic else "traffic"
    return {
        "op": comparison.op, "impl": f"{BOUND}, counted", "dtype": comparison.dtype,
        "shape": dict(comparison.shape), "phase": comparison.phase,
        "ms": max(arithmetic, traffic), "peak_mb": None, "error": None, "rounds": 0,
        "ms_q1": None, "ms_q3": None, "errors": {},
        "note": f"{which} that cannot be done without, at the rates measured here",
    }  # fmt: skip


def with_shares(rows: Sequence[Mapping[str, Any]], floor_ms: float) -> list[dict[str, Any]]:
    """The rows, each with the share of the floor's speed that it reaches."""
    return [{**row, "share_of_floor": floor_ms / row["ms"] if row["ms"] else None} for row in rows]


def ours_of(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((row for row in rows if row["impl"] == OURS), None)
