"""Random features, classes and labels; the last class has no image."""

import torch
import torch.nn.functional as F


def random_problem(n=37, classes=6):
    g = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(n, 5, generator=g), dim=-1)
    weights = F.normalize(torch.randn(classes, 5, generator=g), dim=-1)
    return features, weights, torch.randint(0, classes - 1, (n,), generator=g)
