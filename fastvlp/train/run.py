"""From settings to a trained model: builds what the loop needs, resumes, trains, saves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from fastvlp.nn.ema_model import EmaModel, unwrap
from fastvlp.optim import AdamWEma
from fastvlp.train import automatic, parallel, run_folder, screen
from fastvlp.train.boards import library_of_wandb
from fastvlp.train.checkpointing import Checkpoints
from fastvlp.train.config import TrainAlbef, TrainClip, TrainConfig, TrainVilt, plain
from fastvlp.train.evaluation import Best, Evaluation, interval
from fastvlp.train.interrupts import Interrupts
from fastvlp.train.logging import Log
from fastvlp.train.loop import Loop
from fastvlp.train.parallel import Ranks
from fastvlp.train.schedules import Schedule
from fastvlp.train.tasks.base import Task
from fastvlp.train.tasks.data import about_left_out, left_out

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def train(config: TrainConfig) -> dict[str, float]:
    """Trains, or goes on training, what `config` says; returns the scores on held-out data.

    Started by torchrun, all processes train one model.
    """
    if config.log == "wandb":
        library_of_wandb()  # before anything else takes its time
    with parallel.ranks(config.device) as ranks, run_folder.alone(config.folder, ranks):
        config = automatic.settled(config, ranks)
        # Before a vocabulary is learned, which may take long.
        run_folder.compare(config, ranks)
        torch.manual_seed(config.seed)
        task, loader = _build(config, ranks)
        return fit(config, task, loader, ranks)


def _build(config: TrainConfig, ranks: Ranks) -> tuple[Task, Any]:
    if isinstance(config, TrainClip):
        from fastvlp.train.tasks import clip_setup

        return clip_setup.build(config, ranks)
    if isinstance(config, TrainVilt):
        from fastvlp.train.tasks import vilt_setup

        return vilt_setup.build(config, ranks)
    if isinstance(config, TrainAlbef):
        from fastvlp.train.tasks import albef_setup

        return albef_setup.build(config, ranks)
    raise TypeError(f"config: expected a system's settings, got {type(config).__name__}")


def fit(config: TrainConfig, task: Task, loader: Any, ranks: Ranks) -> dict[str, float]:
    """`train` with a task and a loader of one's own."""
    with run_folder.alone(config.folder, ranks):
        config = automatic.settled(config, ranks)
        return _fit(config, task, loader, ranks)


def _fit(config: TrainConfig, task: Task, loader: Any, ranks: Ranks) -> dict[str, float]:
    changes = run_folder.compare(config, ranks)
    kind = type(task.model)  # FSDP2 changes the class of what it shards
    model, average = _prepare(config, task, ranks)
    loop = _loop(config, task, loader, model, average, ranks)
    checkpoints = Checkpoints(
        config.folder / "checkpoints",
        ranks,
        ema=average,
        every=config.save_every,
        keep=config.keep,
        seed=config.seed,
    )
    opening = _opening(config, loop, ranks)
    _resume(config, loop, checkpoints, ranks)
    evaluated = unwrap(model) if average is None else average.module

    def save(folder: Path) -> None:
        _save(task, kind, evaluated, folder, ranks)

    with Log(
        config.folder, ranks, every=config.log_every, progress=config.progress,
        boards=config.log, settings=plain(config),
    ) as log:  # fmt: skip
        log.start(loop, [*opening, *changes])
        omissions = _Omissions(task, loader, log, ranks)
        omissions.say()
        every = interval(config, loop.steps)
        best = Best(config.folder, save, ranks, loop.step > 0) if every else None
        evaluation = Evaluation(evaluated, every, log, checkpoints, best)
        with Interrupts(checkpoints, ranks) as interrupts:
            # An evaluation that fails must cost neither steps nor the model: it comes after these
            # are saved, and a run that is started again goes on from there.
            loop.hooks = [log, checkpoints, interrupts, evaluation]
            loop.run()
            checkpoints.close()
            interrupts.heed(loop)
        save(config.folder)
        parallel.from_first(lambda: run_folder.saved(config.folder, task.model, loop.step), ranks)
        scores = evaluation.scores(loop)
        omissions.say()
        log.finish(_ending(config, evaluation))
        return scores


def _loop(
    config: TrainConfig,
    task: Task,
    loader: Any,
    model: nn.Module,
    average: EmaModel | None,
    ranks: Ranks,
) -> Loop:
    return Loop(
        task,
        model,
        loader,
        _optimizer(config, task, model, average),
        _schedule(config, loader),
        steps=_steps(config, loader),
        precision=_DTYPES[config.precision if config.precision != "auto" else _best(ranks)],
        clip_norm=config.clip_norm,
        group=ranks.group,
        max_skipped=config.max_skipped,
    )


def _opening(config: TrainConfig, loop: Loop, ranks: Ranks) -> list[str]:
    """What the run is about to do; called while its loader stands at the beginning of an epoch."""
    start, model = getattr(config, "init", None), loop.task.model
    return screen.opening(
        model=model,
        name=f"from {start}" if start is not None else config.model or type(model).__name__,
        data={"data": loop.loader, **getattr(loop.task, "held_out", {})},
        config=config,
        ranks=ranks,
        steps=loop.steps,
        precision=loop.precision,
        epochs=loop.steps / _epoch_steps(loop.loader),
    )


def _ending(config: TrainConfig, evaluation: Evaluation) -> list[str]:
    """Where the models are, and what can be done with them."""
    lines = screen.labelled("model", str(config.folder))
    if evaluation.best is not None and (found := evaluation.best.found) is not None:
        about = f"{evaluation.best.folder}, of step {found.step}: {found.by} {found.value:.4g}"
        lines += screen.labelled("best", about)
    has_data = config.data == "openmoji" or bool(config.eval_data)
    return [*lines, "next", *screen.next_commands(config.system, config.folder, has_data)]


class _Omissions:
    """Says what the loaders of a run leave out, where more is than was said."""

    def __init__(self, task: Task, loader: Any, log: Log, ranks: Ranks) -> None:
        self.loaders = {"data": loader, **getattr(task, "held_out", {})}
        self.log, self.ranks = log, ranks
        self._said = dict.fromkeys(self.loaders, 0)

    def say(self) -> None:
        """Called on all ranks together."""
        for name, loader in self.loaders.items():
            faults = left_out(loader, self.ranks)
            if len(faults) > self._said[name]:
                self.log.say(about_left_out(faults, name))
                self._said[name] = len(faults)


def _prepare(config: TrainConfig, task: Task, ranks: Ranks) -> tuple[nn.Module, EmaModel | None]:
    """The model on its device, wrapped for its ranks, and the moving average of its weights."""
    model = task.model.to(ranks.device)
    averaged = None
    sharded = config.parallel == "fsdp" and ranks.group is not None
    if config.ema is not None and sharded:
        averaged = copy.deepcopy(model)
        blocks = _counterparts(task.blocks(), model, averaged)
        parallel.shard(averaged, blocks, task.forward_methods)
    average = None
    if config.ema is not None and not sharded:
        average = EmaModel(model, config.ema)
    blocks = task.blocks()
    if config.recompute:
        parallel.recompute(blocks)
    if config.compile is not None:
        for block in blocks:
            block.compile(backend=config.compile)
    if sharded:
        model = parallel.shard(model, blocks, task.forward_methods)
        if averaged is not None:
            average = EmaModel(model, config.ema, module=averaged)
    else:
        model = parallel.replicate(model, ranks)
    if ranks.group is not None:
        # Dropout differs between ranks; weights, drawn before, do not.
        torch.manual_seed(config.seed * 65_537 + ranks.rank)
    return model, average


def _counterparts(blocks, model: nn.Module, averaged: nn.Module) -> list[nn.Module]:
    names = {id(module): name for name, module in model.named_modules()}
    return [averaged.get_submodule(names[id(block)]) for block in blocks]


def _optimizer(
    config: TrainConfig, task: Task, model: nn.Module, average: EmaModel | None
) -> AdamWEma:
    decayed, others = [], []
    for name, parameter in unwrap(model).named_parameters():
        if parameter.requires_grad:
            (decayed if task.uses_weight_decay(name, parameter) else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamWEma(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        ema=task.momentum if average is None else average,
    )


def _epoch_steps(loader: Any) -> int:
    """Steps of a whole epoch; called while the loader stands at the beginning of one."""
    steps = len(loader)
    if steps < 1:
        raise ValueError(
            f"batch_size: expected at most the {loader.samples} pairs of the data, got more"
        )
    return steps


def _steps(config: TrainConfig, loader: Any) -> int:
    if config.steps is not None:
        return config.steps
    return max(1, round(config.epochs * _epoch_steps(loader)))


def _schedule(config: TrainConfig, loader: Any) -> Callable[[int], float]:
    return Schedule(
        config.schedule,
        config.lr,
        _steps(config, loader),
        warmup=config.warmup,
        final=config.final_lr,
        warmup_from=config.warmup_lr,
        epoch_steps=_epoch_steps(loader),
    )


def _best(ranks: Ranks) -> str:
    if ranks.device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return "bfloat16" if fast else "float32"


def _resume(config: TrainConfig, loop: Loop, checkpoints: Checkpoints, ranks: Ranks) -> None:
    if config.resume == "never":
        parallel.from_first(lambda: _refuse_checkpoints(config.folder), ranks)
    last = checkpoints.latest()
    if last is not None:
        checkpoints.load(loop, last)
    if loop.step > loop.steps:
        raise ValueError(
            f"steps: expected at least the {loop.step} that the run in {config.folder} has taken, "
            f"got {loop.steps}"
        )

    def begin() -> None:
        run_folder.begin(config, loop.task.model, resumed=last is not None)
        loop.task.save_tokenizer(config.folder)

    parallel.from_first(begin, ranks)


def _refuse_checkpoints(folder: Path) -> None:
    """Before any is examined, which renames damaged ones."""
    if found := run_folder.checkpoints(folder):
        raise ValueError(
            f"folder: {folder} holds the checkpoint {found[-1].name}; choose another folder, or "
            "resume=auto to go on from it"
        )


def _save(task: Task, kind: type, model: nn.Module, folder: Path, ranks: Ranks) -> None:
    """The model as one that is whole and on the CPU, written by the first rank."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)

    def write() -> None:
        whole = kind(task.model.config)
        # By assignment, so that a model of another precision keeps it.
        whole.load_state_dict(state, assign=True)
        task.save(whole, folder)

    parallel.from_first(write, ranks)
