"""Settings by name: those of the papers, and of the built-in images."""

from __future__ import annotations

from typing import Any

# What CLIP takes on the built-in images where nothing else is said.
OPENMOJI_CLIP: dict[str, Any] = {
    "model": "tiny",
    "epochs": 25.0,
    "batch_size": 128,
    "lr": 1e-3,
    "warmup": 60,
}
# Of Radford et al. 2021, tables 18 to 20, for ViT-B/32.
CLIP_PAPER: dict[str, Any] = {
    "model": "ViT-B/32",
    "epochs": 32.0,
    "batch_size": 32768,
    "lr": 5e-4,
    "warmup": 2000,
}
# Of Kim et al. 2021, section 4.2.
VILT_PAPER: dict[str, Any] = {
    "model": "base-p32-384",
    "steps": 100_000,
    "epochs": None,
    "batch_size": 4096,
    "lr": 1e-4,
    "betas": (0.9, 0.98),
    "eps": 1e-8,
    "weight_decay": 0.01,
    "schedule": "linear",
    "warmup": 10_000,
    "mask_rate": 0.15,
}
# Of Li et al. 2021, section 3.5, and their released configuration.
ALBEF_PAPER: dict[str, Any] = {
    "model": "base",
    "epochs": 30.0,
    "batch_size": 512,
    "lr": 1e-4,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.02,
    "schedule": "staircase",
    "warmup": 2000,
    "warmup_lr": 1e-5,
    "final_lr": 1e-5,
    "mask_rate": 0.15,
    "match_ids": False,
    "candidates": 256,
    "precision": "float32",
}

# What `--preset` may name, beside "openmoji", the defaults of the class.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {"openmoji": {}, "paper": CLIP_PAPER},
    "vilt": {"openmoji": {}, "paper": VILT_PAPER},
    "albef": {"openmoji": {}, "paper": ALBEF_PAPER},
}
