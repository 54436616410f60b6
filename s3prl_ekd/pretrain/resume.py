"""Restore a run from its checkpoint: position in the data, optimizer, schedule, random states."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping

import torch

from ..data.settings import DataSettings
from ..errors import CheckpointError
from ..files.config import value_at
from ..system.random_states import set_random_states
from .checkpoints import RUN_STATE_KEY, Progress
from .config_diff import DATA, check_tables, check_unchanged, source_digests, table_digests
from .distributed import ProcessGroup
from .expert import UpstreamPretrainExpert

logger = logging.getLogger(__name__)

SHAR_STREAMS = f"{DATA}.shar_streams"  # another order of as many batches


def resumed_progress(
    states: Mapping,
    path: str,
    upstream: UpstreamPretrainExpert,
    overridden: Collection[str],
    processes: ProcessGroup,
) -> Progress:
    """Read the progress from a checkpoint, and set the position of ``upstream``'s sampler to it.

    Args:
        states: the checkpoint ``path``; empty for a new run.
        upstream: with the checkpoint's weights loaded.
        overridden: config keys that ``-o`` sets in this command.

    Raises:
        EkdError: the checkpoint is damaged, or length tables, teachers or units have changed since.
    """
    data, sampler = upstream.data, upstream.dataloader.sampler
    tables = table_digests(data.file_path, data.sets)
    sources = source_digests(upstream.settings)
    if RUN_STATE_KEY in states:
        progress = Progress.from_state_dict(states[RUN_STATE_KEY], path)
        check_unchanged(progress.sources, sources)
        check_tables(progress.tables, tables, data.file_path, overridden)
        changed = progress.tables != tables or progress.batches != len(sampler)
        if changed or (SHAR_STREAMS in overridden and _other_streams(states, data.shar_streams)):
            logger.warning("the batches changed since the checkpoint; starting a new epoch")
            progress.epoch, progress.batch = progress.epoch + 1, 0
    else:
        progress = Progress(states.get("Step", 0), epoch=sampler.epoch, batch=sampler.position)
        if states:
            logger.warning("%s is from s3prl's own Runner: random states start from the seed", path)
    progress.tables, progress.sources, progress.batches = tables, sources, len(sampler)
    sampler.seek(progress.epoch, progress.batch, processes.rank, processes.world_size)
    return progress


def _other_streams(states: Mapping, streams: int) -> bool:
    """Whether the run of a checkpoint had another number of streams of Shar folders."""
    saved = value_at(states, f"Config.{SHAR_STREAMS}")
    return (DataSettings.shar_streams if saved is None else saved) != streams


def resume_random(states: Mapping, path: str, processes: ProcessGroup, device: str) -> bool:
    """Restore this process's random states, if the number of processes is that of the checkpoint.

    Returns whether they were restored. Raises CheckpointError if the saved states are damaged.
    """
    if RUN_STATE_KEY not in states:
        return False
    saved = states[RUN_STATE_KEY]["random"]
    if len(saved) != processes.world_size:
        counts = f"the checkpoint has {len(saved)} processes, this run {processes.world_size}"
        logger.warning("random states start from the seed: %s", counts)
        return False
    try:
        set_random_states(saved[processes.rank], device)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return True


def resume_optimizer(optimizer: torch.optim.Optimizer, states: Mapping, path: str) -> None:
    """Load the checkpoint's moments; keep learning rate and other settings as configured.

    With the checkpoint's settings, ``-o`` could not change them, and a run that is made longer
    would continue at a learning rate of 0, the end of its old schedule. Raises CheckpointError if
    the moments are missing or do not fit.
    """
    configured = [{**group} for group in optimizer.param_groups]
    try:
        # A copy, because the checkpoint's tensors are memory-mapped from its file.
        optimizer.load_state_dict(copy.deepcopy(states["Optimizer"]))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        problem = f"{path}: its optimizer state does not fit this run: {error}"
        raise CheckpointError(problem) from None
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.pop("initial_lr", None)  # a new schedule would keep it as its base rate
        group.update(settings)


def resume_scheduler(
    scheduler: torch.optim.lr_scheduler.LambdaLR, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Advance a new schedule to ``step``.

    All of s3prl's schedules are functions of the step. Their saved state is not loaded: it would
    undo a learning rate set by ``-o``, and leave the first step's rate in the optimizer.
    """
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    factors = [factor(step) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = [base * f for base, f in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
