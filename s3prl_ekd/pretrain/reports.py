"""What a run tells on its way: counts, scalars for TensorBoard, the dev loss."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from typing import Any

import torch
from tqdm import tqdm

from .bad_audio import UsableBatches
from .dev import dev_loss
from .distributed import mean_records
from .optim import Update, not_finite

logger = logging.getLogger(__name__)


class Reports:
    """The Runner's part that reports; its attributes are the Runner's."""

    args: Any
    settings: Any
    device: str
    hint: str
    upstream: Any
    updater: Any
    processes: Any
    progress: Any
    bad: Any
    logger: Any
    saves: Any
    autocast: Any
    stop: Any

    def _count(self, update: Update) -> None:
        """Keep what an update has to tell; stop after too many that were not made.

        Raises:
            NotFiniteError: naming the utterances.
        """
        place = self.progress
        if update.made:
            place.skipped_in_a_row = 0
            for name, values in self._new.items():
                place.records[name] += values
            return
        names = [name for each in self.processes.gather(self.updater.names) for name in each]
        place.skipped += 1
        place.skipped_in_a_row += 1
        level = logging.INFO if update.scaling else logging.WARNING
        logger.log(
            level if self.processes.writer else logging.DEBUG,
            "step %d skipped (%d in a row): loss %g, norm of the gradient %g, utterances %s",
            place.step,
            place.skipped_in_a_row,
            update.loss,
            update.norm,
            "not looked at: fp16 lowers its scale" if update.scaling else ", ".join(names[:8]),
        )
        if place.skipped_in_a_row >= self.settings.max_nonfinite:
            raise not_finite(place.step, place.skipped_in_a_row, names, self.hint)

    def _log(self, update: Update) -> None:
        """To TensorBoard, under s3prl's names: of this step, and means since the last point."""
        place, prefix = self.progress, f"{self.args.upstream}/train-"
        (loss,) = self.processes.sum(update.loss)
        self._share_records()
        scalars = {
            "loss": loss / self.processes.count,
            "lr": self.updater.rate(),
            "gradient-norm": update.norm,
        }
        if place.skipped:
            scalars["skipped"] = place.skipped
        for name, value in scalars.items():
            self.logger.add_scalar(prefix + name, value, global_step=place.step)
        self.upstream.log_records(
            records=place.records, logger=self.logger, prefix=prefix, global_step=place.step
        )
        place.records = defaultdict(list)

    def _measure(self) -> None:
        """Measure the dev loss, which is due no more; keep the checkpoint of the lowest apart."""
        place = self.progress
        batches = UsableBatches(
            self.upstream.dev_dataloader, self.bad, place.epoch, self.stop.batches
        )
        with self.autocast:
            mine = dev_loss(self.upstream, batches, place.step, self.device)
        self.bad.commit()
        total, samples = self.processes.sum(*mine)
        if not samples:
            raise self.bad.nothing_left("dev_sets")
        loss = total / samples
        self.logger.add_scalar(f"{self.args.upstream}/dev-loss", loss, global_step=place.step)
        place.dev_due = False  # in the best checkpoint, too
        better = math.isfinite(loss) and (place.best_loss is None or loss < place.best_loss)
        if self.processes.writer:
            best = ", the best" * better
            tqdm.write(f"[Runner] - dev loss {loss:.5f} at step {place.step}{best}")
        if better:
            place.best_loss, place.best_step = loss, place.step
            states = self._states()
            if self.processes.writer:
                self.saves.best(states)

    def _share_records(self) -> None:
        """The scalars since TensorBoard's last point: the same in all processes, their means."""
        if self.processes.count > 1:
            mine = {
                name: torch.stack([value.float().cpu() for value in values]).tolist()
                for name, values in self.progress.records.items()
            }
            means = mean_records(self.processes.gather(mine))
            self.progress.records = defaultdict(
                list, {name: list(torch.tensor(values)) for name, values in means.items()}
            )
