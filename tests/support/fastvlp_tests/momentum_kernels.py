"""The check of the momentum-contrastive kernels against the float64 reference."""

import math

import torch

from fastvlp.ops import momentum_contrastive
from fastvlp_tests.momentum_cases import NAMES
from fastvlp_tests.tolerance import assert_as_accurate, epsilon


def check(run_kernel, step, teacher=True):
    ours = run_kernel(
        "momentum_contrastive.losses",
        "momentum_contrastive",
        *step.arguments(),
        teacher,
        True,
        True,
    )
    exact = step.run(momentum_contrastive, torch.float64)
    dtype, batch = step.features[0].dtype, len(step.features[0])
    longest = max(t.double().nan_to_num().norm(dim=1).max().item() if len(t) else 0.0
                  for t in step.features)  # fmt: skip
    # The kernels round products, logits and weights once each: nothing like the eager logits of
    # the features' dtype, so the bound is that of these roundings alone.
    rounding = epsilon(torch.float32) * (longest**2 / step.temperature + math.log(1000))
    weights = epsilon(dtype) if dtype != torch.float32 else 0.0
    share = longest / (math.sqrt(batch) * step.temperature)
    terms = share * (2 * rounding + weights)
    floors = {
        # The teacher's part of the loss comes from its weighted keys.
        "loss": 2 * rounding + weights * longest**2 / step.temperature,
        "image": terms + epsilon(dtype) * exact[1].norm().item(),
        "text": terms + epsilon(dtype) * exact[2].norm().item(),
        "temperature": terms * longest * math.sqrt(2 * batch) / step.temperature,
    }
    for name, our, true in zip(NAMES, ours, exact, strict=False):
        assert_as_accurate(name, our, true, true, floors[name])
    assert ours[1].dtype == ours[2].dtype == dtype
    for sampled, known in zip(ours[4:], exact[4:], strict=True):
        assert (sampled != known).sum() <= 1
    return ours
