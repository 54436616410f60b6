"""Restore a run from its checkpoint: position in the data, optimizer, schedule, random states."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Collection, Mapping

import torch

from ..data.settings import DataSettings
from ..errors import CheckpointError
from ..files.config import value_at
from ..system.random_states import set_random_states
from .checkpoints import RUN_STATE_KEY, Progress
from .config_diff import DATA, check_tables, check_unchanged
from .distributed import ProcessGroup
from .expert import UpstreamPretrainExpert

logger = logging.getLogger(__name__)

SHAR_STREAMS = f"{DATA}.shar_streams"  # another order of as many batches
DEV_KEYS = ("sequence_length", "max_timestep", "target_cache")  # which the dev loss depends on


def resumed_progress(
    states: Mapping,
    path: str,
    upstream: UpstreamPretrainExpert,
    overridden: Collection[str],
    new: Progress,
) -> Progress:
    """Read the progress from a checkpoint.

    Args:
        states: the checkpoint ``path``.
        upstream: with the checkpoint's weights loaded.
        overridden: config keys that ``-o`` sets in this command.
        new: of a new run, with the digests of tables, teachers and units now.

    Raises:
        EkdError: the checkpoint is damaged, or length tables, teachers or units have changed since.
    """
    data, sampler = upstream.data, upstream.dataloader.sampler
    if RUN_STATE_KEY not in states:
        logger.warning("%s is from s3prl's own Runner: random states start from the seed", path)
        position = {"epoch": sampler.epoch, "batch": sampler.position}
        return dataclasses.replace(new, step=states.get("Step", 0), **position)
    progress = Progress.from_state_dict(states[RUN_STATE_KEY], path)
    check_unchanged(progress.sources, new.sources)
    check_tables(progress.tables, new.tables, data.file_path, overridden)
    changed = progress.tables != new.tables or progress.batches != new.batches
    if changed or (SHAR_STREAMS in overridden and _other(states, data, "shar_streams")):
        logger.warning("the batches changed since the checkpoint; starting a new epoch")
        progress.epoch, progress.batch = progress.epoch + 1, 0
    if progress.best_loss is not None and _other_dev_data(states, data, progress, new.dev_tables):
        logger.warning(
            "the data of the dev loss changed since the checkpoint, so the lowest one, %.5f at "
            "step %d, is not compared with later ones",
            *(progress.best_loss, progress.best_step),
        )
        progress.best_loss, progress.best_step = None, 0
    progress.tables, progress.sources, progress.batches = new.tables, new.sources, new.batches
    progress.dev_tables = new.dev_tables or progress.dev_tables  # without dev sets: of the best
    return progress


def _other(states: Mapping, data: DataSettings, key: str) -> bool:
    """Whether a key of ``datarc`` with a default has another value in the run of a checkpoint."""
    saved = value_at(states, f"Config.{DATA}.{key}")
    return (getattr(DataSettings, key) if saved is None else saved) != getattr(data, key)


def _other_dev_data(
    states: Mapping, data: DataSettings, progress: Progress, tables: Mapping[str, str]
) -> bool:
    """Whether the run measures its dev loss, but on other data than those of its ``best_loss``."""
    saved = value_at(states, f"Config.{DATA}.dev_sets") or ()
    # earlier versions saved only the names
    tables_changed = progress.dev_tables != tables if progress.dev_tables else {*saved} != {*tables}
    return bool(tables) and (tables_changed or any(_other(states, data, key) for key in DEV_KEYS))


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
