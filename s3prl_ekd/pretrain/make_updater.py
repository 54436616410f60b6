"""Optimizer, schedule and loss scale of a run, from its config and its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import SetupError
from .fused_adamw import fused_adamw, warmup_schedule
from .fused_adamw_settings import FUSED_ADAMW
from .optim import Updater
from .precision import halves
from .resume import resume_optimizer, resume_scheduler


def make_updater(runner: Any, states: Mapping) -> Updater:
    """What makes the updates of a run.

    Args:
        runner: our Runner; s3prl's part of it makes s3prl's optimizers and schedules.
        states: the checkpoint to go on from; empty for a new run.

    Raises:
        CheckpointError: the checkpoint's optimizer does not fit.
        SetupError: torch refuses the optimizer's settings.
    """
    run, config, place = runner.settings, runner.config, runner.progress
    model = runner.upstream.model
    ours = config["optimizer"]["name"] == FUSED_ADAMW
    scaler = torch.amp.GradScaler("cuda", enabled=halves(run, runner.device))
    if place.scaler:
        scaler.load_state_dict(place.scaler)
    try:
        if ours:
            optimizer = fused_adamw(model, config["optimizer"])
        else:
            optimizer = runner._get_optimizer([model])
    except (TypeError, ValueError, AttributeError) as error:
        raise SetupError(f"optimizer {config['optimizer']} cannot be made: {error}") from None
    if states:
        resume_optimizer(optimizer, states, runner.args.init_ckpt)
    scheduler = None
    if config.get("scheduler"):
        scheduler = runner._get_scheduler(optimizer)
    elif ours:
        scheduler = warmup_schedule(optimizer, config["optimizer"], run.total_steps)
    if states and scheduler is not None:
        resume_scheduler(scheduler, optimizer, place.step)
    clipping, each = run.gradient_clipping, run.gradient_accumulate_steps
    return Updater(model, optimizer, scheduler, scaler, clipping, each, runner.processes)
