"""Downstream runs that go on exactly where they were cut.

s3prl saves weights, optimizer, schedule, step and epoch; on resume it seeds all generators anew and
begins the epoch again, so a cut run ends elsewhere than one that was not. Here each checkpoint also
says how many batches of its epoch were taken, and the generators' states at the epoch's begin and
now. On resume the taken batches are drawn again and thrown away (that costs their reading), and
the generators are put back.

Not exact: several processes (torchrun), and ``fp16``, whose scale s3prl does not save.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..compat.replaced import replaced
from ..files.formats import CHECKPOINT_PARTS, RESUME

logger = logging.getLogger(__name__)

KEY = RESUME  # in a checkpoint of run_downstream.py, beside s3prl's keys
VERSION = CHECKPOINT_PARTS[KEY]


def generator_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, as plain data and tensors."""
    version, numbers, gauss = random.getstate()
    state: Any = np.random.get_state()  # a tuple; a dict only where it is asked for
    name, keys, position, has_gauss, cached = state
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generators(states: dict[str, Any]) -> None:
    """Put back what :func:`generator_states` gave."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


class Place:
    """Where in its epoch a run is."""

    def __init__(self, saved: dict[str, Any] | None):
        self.saved = saved  # to go to; None once there, or for a new run
        self.epoch_start = generator_states()
        self.batches = 0

    def state(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "epoch_start": self.epoch_start,
            "batches": self.batches,
            "now": generator_states(),
        }

    def begin_epoch(self) -> None:
        """Before the epoch's loader is made, which may draw numbers too."""
        if self.saved is not None:
            set_generators(self.saved["epoch_start"])
        self.epoch_start = generator_states()
        self.batches = 0

    def follow(self, loader) -> Iterator:
        """The batches of ``loader``, those that were taken before the cut left out."""
        batches = iter(loader)
        if self.saved is not None:
            logger.info("going on after batch %d of the epoch", self.saved["batches"])
            taken = sum(1 for _ in itertools.islice(batches, self.saved["batches"]))
            if taken < self.saved["batches"]:  # the data or the batch size is another by now
                logger.warning("the epoch has %d batches only; the next one begins", taken)
            self.batches = taken
            set_generators(self.saved["now"])
            self.saved = None
        for batch in batches:
            self.batches += 1
            yield batch


class FollowedLoader:
    """A data loader whose batches are counted; everything else is the loader's own."""

    def __init__(self, loader, place: Place):
        self._loader, self._place = loader, place

    def __iter__(self) -> Iterator:
        return self._place.follow(self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str):
        return getattr(self._loader, name)


def exact(runner: Any) -> Any:
    """s3prl's downstream ``Runner``, made to save and take up its place in the epoch."""

    class ExactRunner(runner):
        def __init__(self, args, config):
            super().__init__(args, config)
            alone = not torch.distributed.is_initialized()
            saved = self.init_ckpt.get(KEY) if alone and args.mode == "train" else None
            self._place = Place(saved)
            model = self.downstream.model
            split = config["runner"].get("train_dataloader", "train")
            get_dataloader = model.get_dataloader

            def followed(name, *rest, **named):
                if name != split:
                    return get_dataloader(name, *rest, **named)
                self._place.begin_epoch()
                return FollowedLoader(get_dataloader(name, *rest, **named), self._place)

            model.get_dataloader = followed

        def _get_scheduler(self, optimizer):
            # A new schedule sets the optimizer's learning rate to that of step 0 (with a warm-up:
            # to nothing), and reading its old state does not set it back.
            scheduler = super()._get_scheduler(optimizer)
            if self.init_ckpt.get("Scheduler"):
                for group, rate in zip(
                    optimizer.param_groups, scheduler.get_last_lr(), strict=True
                ):
                    group["lr"] = rate
            return scheduler

        def train(self):
            save = torch.save

            def save_with_place(states, *rest, **named):
                if isinstance(states, dict) and "Downstream" in states:
                    states = {**states, KEY: self._place.state()}
                return save(states, *rest, **named)

            with replaced(torch, "save", save_with_place):
                super().train()

    return ExactRunner
