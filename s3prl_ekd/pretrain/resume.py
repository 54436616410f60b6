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
from torch import nn

from ..errors import CheckpointError
from .checkpoints import KEY, Progress
from .config_diff import check_tables, table_digests
from .distributed import Processes


def random_states(device: str = "cpu") -> dict[str, Any]:
    """The states of all generators, as plain data and tensors that a checkpoint may hold.

    Args:
        device: of the run. The state of a CUDA device's generator is on the CPU: no wait for it.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    on_cuda = str(device).startswith("cuda")
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if on_cuda else None,
    }


def set_random_states(states: dict[str, Any], device: str = "cpu") -> None:
    """Put back what :func:`random_states` gave. The CUDA state is passed over on another device.

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
    """What happens within draws as it likes; the generators are then as they were before."""
    states = random_states(device)
    try:
        yield
    finally:
        set_random_states(states, device)


logger = logging.getLogger(__name__)


def resumed_progress(
    states: Mapping,
    where: str,
    upstream: nn.Module,
    typed: Collection[str],
    processes: Processes,
) -> Progress:
    """Where the checkpoint ``states`` stands; the sampler of ``upstream`` is put there too.

    Args:
        states: empty for a new run.
        where: what messages call it.
        upstream: the adapter, which has taken the weights already.
        typed: the config's keys that ``-o`` sets at this start.
        processes: of the run.

    Raises:
        EkdError: the checkpoint is damaged, or the corpus tables are others than then.
    """
    data, sampler = upstream.data, upstream.dataloader.sampler
    tables = table_digests(data.file_path, data.sets)
    if KEY in states:
        place = Progress.unpacked(states[KEY], where)
        check_tables(place.tables, tables, data.file_path, typed)
        if place.tables != tables or place.batches != len(sampler):
            logger.warning("the batches are others than before: beginning a new pass over them")
            place.epoch, place.batch = place.epoch + 1, 0
    else:
        place = Progress(states.get("Step", 0), epoch=sampler.epoch, batch=sampler.position)
        if states:
            logger.warning("%s is of s3prl's own Runner: random numbers begin anew", where)
    place.tables, place.batches = tables, len(sampler)
    sampler.go_to(place.epoch, place.batch, processes.rank, processes.count)
    return place


def resume_random(states: Mapping, where: str, processes: Processes, device: str) -> bool:
    """Put the random number generators back, where they are those of as many processes.

    Returns:
        Whether that was so.

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
        raise CheckpointError(f"{where} is damaged: {error}") from None
    return True


def resume_optimizer(optimizer: torch.optim.Optimizer, states: Mapping, where: str) -> None:
    """Take the moments from the checkpoint, and leave learning rate and its like as configured.

    They are the same unless ``-o`` has changed them: without this a run that is made longer would
    go on at a learning rate of 0, the end of its old schedule.

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
        raise CheckpointError(f"the optimizer in {where} does not fit this run: {error}") from None
    for group, new in zip(optimizer.param_groups, fresh, strict=True):
        group.update(new)


def resume_scheduler(
    scheduler: torch.optim.lr_scheduler.LambdaLR, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Let a new schedule be where it would be after ``step`` steps.

    s3prl's are all functions of the step. Their saved state would bring the old learning rate back
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
