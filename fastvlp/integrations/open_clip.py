"""open_clip's training script with the losses of `fastvlp.losses`.

import sys

from fastvlp.integrations.open_clip import patch

patch()
from open_clip_train.main import main

main(sys.argv[1:])
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from fastvlp.losses import ClipLoss, SigLipLoss

# What makes the loss: the former in releases up to 3.x, the latter wraps model and loss in a task.
FACTORIES = ("create_loss", "create_task")
_log = logging.getLogger(__name__)


def patch() -> list[str]:
    """Lets open_clip's factories, and thus its training script, use fastvlp's losses.

    Whatever `create_loss` or `create_task` chooses by its arguments stays chosen: a loss that is
    exactly open_clip's ClipLoss or SigLipLoss is replaced by fastvlp's of the same name with the
    same options; distillation, CoCa and any other loss stay open_clip's own. Over ranks without
    `--gather-with-grad` gradients are larger than open_clip's, see `fastvlp.losses.ClipLoss`.

    Call it once before training, before or after `open_clip_train` was imported. A second call
    changes nothing more.

    Returns:
        The names of the functions that now make fastvlp's losses, "open_clip.create_loss", ...

    Raises:
        ImportError: open_clip is not installed.
        RuntimeError: this open_clip has none of the functions; and later, when one of them is
            called, for an option of the loss that fastvlp does not know.
        ValueError: when one of them is called, for options that fastvlp's loss refuses
            (`--local-loss` without `--gather-with-grad`, `--horovod`).
    """
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            "open_clip: expected to be installed; pip install open_clip_torch"
        ) from error
    replaced = []
    for module_name, module in sorted(sys.modules.items()):
        if module_name.partition(".")[0] not in ("open_clip", "open_clip_train"):
            continue
        for name in FACTORIES:
            factory = vars(module).get(name)
            if callable(factory) and not isinstance(factory, _WithOurLoss):
                setattr(module, name, _WithOurLoss(factory))
            if name in vars(module):
                replaced.append(f"{module_name}.{name}")
    if not replaced:
        version = getattr(open_clip, "__version__", "of unknown version")
        raise RuntimeError(
            f"open_clip {version} has no function {' or '.join(FACTORIES)} to patch; in your own "
            "loop use fastvlp.losses.ClipLoss or SigLipLoss in place of open_clip's"
        )
    return replaced


class _WithOurLoss:
    """A factory of open_clip whose result has fastvlp's loss where that is the same function."""

    def __init__(self, factory: Callable[..., nn.Module]):
        functools.update_wrapper(self, factory)
        self._factory = factory

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        made = self._factory(*args, **kwargs)
        loss = getattr(made, "loss", None)
        if isinstance(loss, nn.Module):  # a task
            made.loss = _ours(loss)
            return made
        return _ours(made)


def _ours(loss: nn.Module) -> nn.Module:
    from open_clip import loss as theirs

    for kind in (ClipLoss, SigLipLoss):
        # Exactly this class: one derived from it computes something else.
        if type(loss) is getattr(theirs, kind.__name__, None):
            _log.info("fastvlp computes %s", kind.__name__)
            return kind(**_options(loss, kind)).train(loss.training)
    _log.info("%s stays open_clip's", type(loss).__name__)
    return loss


def _options(loss: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """The arguments that `loss` was made with, of those that `kind` knows."""
    known, options = inspect.signature(kind).parameters, {}
    for name, parameter in inspect.signature(type(loss)).parameters.items():
        value = getattr(loss, name, parameter.default)
        if name in known:
            options[name] = value
        elif value != parameter.default:
            raise RuntimeError(
                f"{name}: open_clip's {type(loss).__name__} has {name}={value!r}, which fastvlp "
                "does not know; leave it at its default, or train without patch()"
            )
    return options
