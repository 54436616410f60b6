"""Restore a run from its checkpoint: position in the data, optimizer, schedule, random states."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError
from .checkpoints import KEY, Progress
from .config_diff import check_tables, table_digests
from .distributed import Processes
from .expert import UpstreamPretrainExpert

logger = logging.getLogger(__name__)


def random_states(device: str = "cpu") -> dict[str, Any]:
    """The states of all generators, as plain data and tensors that a checkpoint may hold.

    Args:
        device: of the run. The state of a CUDA device's generator is on the CPU: no wait for it.
    """
    version, words, gauss = random.getstate()
    state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = state
    on_cuda = str(device).startswith("cuda")
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if on_cuda else None,
    }


def set_random_states(states: dict[str, Any], device: str = "cpu") -> None:
    """Restore :func:`random_states`. The CUDA state is ignored on another device.

    Raises:
        ValueError: these are no such states.
    """
    try:
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
        name, keys, position, has_gauss, cached = states["numpy"]
        keys = keys.numpy().astype(np.uint32)
        np.random.set_state((name, keys, position, has_gauss, cached))
        torch.set_rng_state(states["torch"])
        if states["cuda"] is not None and str(device).startswith("cuda"):
            torch.cuda.set_rng_state(states["cuda"], device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"no states of random number generators: {error}") from None


@contextlib.contextmanager
def random_numbers_untouched(device: str = "cpu") -> Iterator[None]:
    """Restore the states of all generators on exit."""
    states = random_states(device)
    try:
        yield
    finally:
        set_random_states(states, device)


def resumed_progress(
    states: Mapping,
    path: str,
    upstream: UpstreamPretrainExpert,
    overridden: Collection[str],
    processes: Processes,
) -> Progress:
    """The progress in a checkpoint; the sampler of ``upstream`` is set to it.

    Args:
        states: the checkpoint; empty for a new run.
        path: of the checkpoint, for messages.
        upstream: has loaded its weights already.
        overridden: the config's keys that ``-o`` sets at this start.
        processes: of the run.

    Raises:
        EkdError: the checkpoint is damaged, or the corpus tables are others than then.
    """
    data, sampler = upstream.data, upstream.dataloader.sampler
    tables = table_digests(data.file_path, data.sets)
    if KEY in states:
        progress = Progress.from_state_dict(states[KEY], path)
        check_tables(progress.tables, tables, data.file_path, overridden)
        if progress.tables != tables or progress.batches != len(sampler):
            logger.warning("the batches are others than before: beginning a new pass over them")
            progress.epoch, progress.batch = progress.epoch + 1, 0
    else:
        progress = Progress(states.get("Step", 0), epoch=sampler.epoch, batch=sampler.position)
        if states:
            logger.warning("%s is of s3prl's own Runner: random numbers begin anew", path)
    progress.tables, progress.batches = tables, len(sampler)
    sampler.go_to(progress.epoch, progress.batch, processes.rank, processes.count)
    return progress


def resume_random(states: Mapping, path: str, processes: Processes, device: str) -> bool:
    """Restore the random states, if they were saved by the same number of processes.

    Returns:
        Whether they were restored.

    Raises:
        CheckpointError: they are damaged.
    """
    if KEY not in states:
        return False
    saved = states[KEY]["random"]
    if len(saved) != processes.count:
        logger.warning("another number of processes than before: random numbers begin anew")
        return False
    try:
        set_random_states(saved[processes.rank], device)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return True


def resume_optimizer(optimizer: torch.optim.Optimizer, states: Mapping, path: str) -> None:
    """Load the moments of the checkpoint, and keep learning rate and the like as configured.

    They are the same unless ``-o`` has changed them: otherwise a run that is made longer would
    continue at a learning rate of 0, the end of its old schedule.

    Raises:
        CheckpointError: they are not there or do not fit.
    """
    fresh = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    try:
        # A copy: else the moments would be pages of the checkpoint's file.
        optimizer.load_state_dict(copy.deepcopy(states["Optimizer"]))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the optimizer in {path} does not fit this run: {error}") from None
    for group, new in zip(optimizer.param_groups, fresh, strict=True):
        group.update(new)


def resume_scheduler(
    scheduler: torch.optim.lr_scheduler.LambdaLR, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Advance a new schedule to ``step``.

    s3prl's are all functions of the step. Their saved state would restore the old learning rate
    where ``-o`` changes it, and would leave the rate of the first step in the optimizer.
    """
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    scheduler._last_lr = [
        base * rate(step)
        for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
