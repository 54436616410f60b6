"""Exact resume of downstream runs.

s3prl saves weights, optimizer, schedule, step and epoch. On resume it reseeds all random generators
and restarts the epoch, so an interrupted run ends with a different result. Here each
checkpoint also has the number of batches consumed in its epoch, and the random states at the start
of the epoch and at the time of saving. On resume the consumed batches are read again and discarded,
which costs their loading time, and the random states are restored.

s3prl also removes the older checkpoints before it writes a new one, so a run killed while saving
could lose all of its training. Here they are removed once the new one is written.

A checkpoint has the SHA-256 of the upstream's file, too, so that a head is never used with another
upstream that was written to the same path.

Not exact: several processes (torchrun), and ``fp16``, as s3prl does not save its loss scale.
"""

from __future__ import annotations

import itertools
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..compat.replaced import replaced
from ..errors import CheckpointError
from ..files.formats import CHECKPOINT_PARTS, RESUME, UPSTREAM
from ..system.random_states import random_states, set_random_states
from ..teachers.student_source import find_student

logger = logging.getLogger(__name__)

KEY = RESUME  # in a checkpoint of run_downstream.py, in addition to s3prl's keys
VERSION = CHECKPOINT_PARTS[KEY]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class EpochPosition:
    """A run's position in its epoch: consumed batches and random states."""

    def __init__(self, saved: dict[str, Any] | None):
        self.saved = saved  # state to restore; None for a new run and once it is restored
        self.epoch_start = random_states(_device())
        self.batches = 0

    def state(self) -> dict[str, Any]:
        """This position as an entry of a checkpoint."""
        return {
            "version": VERSION,
            "epoch_start": self.epoch_start,
            "batches": self.batches,
            "now": random_states(_device()),
        }

    def begin_epoch(self) -> None:
        """Call this before building the epoch's loader, which may draw random numbers too."""
        if self.saved is not None:
            set_random_states(self.saved["epoch_start"], _device())
        self.epoch_start = random_states(_device())
        self.batches = 0

    def remaining(self, loader) -> Iterator:
        """Yield the batches of ``loader`` that come after the restored position."""
        batches = iter(loader)
        if self.saved is not None:
            logger.info("resuming after batch %d of the epoch", self.saved["batches"])
            skipped = sum(1 for _ in itertools.islice(batches, self.saved["batches"]))
            if skipped < self.saved["batches"]:  # the data or the batch size has changed
                logger.warning("the epoch now has %d batches; starting the next epoch", skipped)
            self.batches = skipped
            set_random_states(self.saved["now"], _device())
            self.saved = None
        for batch in batches:
            self.batches += 1
            yield batch


class ResumableLoader:
    """Wraps a data loader to skip and count batches; other attributes are the loader's."""

    def __init__(self, loader, position: EpochPosition):
        self._loader, self._position = loader, position

    def __iter__(self) -> Iterator:
        return self._position.remaining(self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str):
        return getattr(self._loader, name)


def upstream_sha256(name: Any, path: Any) -> str | None:
    """SHA-256 of an upstream's file, or of a student's folder; None for a name, URL or id."""
    is_folder = path and Path(str(path)).is_dir() and str(name).startswith("ekd_student")
    return find_student(path).sha256() if is_folder or (path and Path(path).is_file()) else None


def check_upstream_unchanged(
    states: Mapping[str, Any], location: str, overrides: Mapping[str, Any] | None = None
) -> None:
    """Check that an upstream's file is that with which a downstream run was trained.

    Args:
        states: the run's checkpoint. One of an earlier version has no SHA-256, and passes.
        location: starts the message.
        overrides: of the arguments, by ``-o``. Another upstream that they name gives a warning.

    Raises:
        CheckpointError: the file has changed.
    """
    args, overrides = vars(states["Args"]), overrides or {}
    saved = states.get(UPSTREAM)
    expected = saved.get("sha256") if isinstance(saved, Mapping) else None
    path = overrides.get("upstream_ckpt", args.get("upstream_ckpt"))
    current = upstream_sha256(args.get("upstream"), path) if expected else None
    if current is None or current == expected:
        return
    if "upstream_ckpt" in overrides:
        logger.warning("%s was trained on another upstream than %s", location, path)
        return
    raise CheckpointError(
        f"{location}: the upstream -k {path} has changed since this run was trained on it; restore "
        "the file, or train another run on the new one. If the file was only moved, add -o "
        "\"args.upstream_ckpt='PATH'\""
    )


def _keep_corpus(model: Any) -> Callable[..., Any]:
    """The model's ``get_dataloader``, with its ``corpus`` settings restored after each call.

    s3prl's ``-d ctc`` removes ``num_workers`` from them, also for the checkpoints. Later epochs,
    evaluations and resumed runs would start 12 workers each, regardless of the YAML.
    """
    get_dataloader = model.get_dataloader
    corpus = getattr(model, "corpus", None)
    if not isinstance(corpus, dict):
        return get_dataloader
    settings = dict(corpus)

    def get_with_corpus(*args: Any, **kwargs: Any) -> Any:
        try:
            return get_dataloader(*args, **kwargs)
        finally:
            corpus.update(settings)

    return get_with_corpus


def _is_resumable(path: Any) -> bool:
    """Whether a path is that of a checkpoint from which s3prl resumes."""
    return isinstance(path, (str, Path)) and Path(path).match("states-*.ckpt")


def resumable_runner(runner: Any) -> Any:
    """Subclass s3prl's downstream ``Runner`` to save and restore its position in the epoch."""

    class ResumableRunner(runner):
        def __init__(self, args: Namespace, config: dict[str, Any]):
            training = args.mode == "train"
            digest = upstream_sha256(args.upstream, args.upstream_ckpt) if training else None
            self._upstream = {"version": CHECKPOINT_PARTS[UPSTREAM], "sha256": digest}
            super().__init__(args, config)
            single = not torch.distributed.is_initialized()
            saved = self.init_ckpt.get(KEY) if single and args.mode == "train" else None
            self._position = EpochPosition(saved)
            model = self.downstream.model
            split = config["runner"].get("train_dataloader", "train")
            get_dataloader = _keep_corpus(model)

            def get_resumable(name, *args, **kwargs):
                if name != split:
                    return get_dataloader(name, *args, **kwargs)
                self._position.begin_epoch()
                return ResumableLoader(get_dataloader(name, *args, **kwargs), self._position)

            model.get_dataloader = get_resumable

        def _get_scheduler(self, optimizer):
            # A new schedule sets the optimizer's learning rate to that of step 0 (0 with a
            # warm-up), and loading the schedule's state does not restore it.
            scheduler = super()._get_scheduler(optimizer)
            if self.init_ckpt.get("Scheduler"):
                for group, rate in zip(
                    optimizer.param_groups, scheduler.get_last_lr(), strict=True
                ):
                    group["lr"] = rate
            return scheduler

        def train(self):
            save, remove = torch.save, os.remove
            outdated = []  # checkpoints that s3prl has removed

            def save_with_position(states, path, *args, **kwargs):
                if not (isinstance(states, dict) and "Downstream" in states):
                    return save(states, path, *args, **kwargs)
                own = {KEY: self._position.state(), UPSTREAM: self._upstream}
                save({**states, **own}, path, *args, **kwargs)
                if _is_resumable(path):
                    while outdated:
                        remove(outdated.pop())

            def remove_later(path, *args, **kwargs):
                if _is_resumable(path):
                    outdated.append(Path(path))
                else:
                    remove(path, *args, **kwargs)

            with replaced(torch, "save", save_with_position), replaced(os, "remove", remove_later):
                super().train()

    return ResumableRunner
