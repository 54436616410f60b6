"""s3prl's pretrain Runner for runs of days: whatever ends one, it goes on as if nothing had.

The step is s3prl's (forward, accumulate, clip, update, log), and so are the numbers. What is ours
is around it. A checkpoint holds all that the next step depends on, so that a run which was killed
and resumed ends with the weights of one which was not, bit for bit on one kind of machine.
"""

from __future__ import annotations

import logging
import math
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from tqdm import tqdm

from .checkpoints import read_run
from .config import check_runner_config
from .data.batches import Batch
from .training.dev import dev_loss
from .training.memory import memory_explained, workers_explained
from .training.processes import Processes
from .training.progress import KEY
from .training.random_state import random_states
from .training.resume import (
    resume_optimizer,
    resume_random,
    resume_scheduler,
    resumed_progress,
)
from .training.saves import RunSaves, SaveError
from .training.scalars import ScalarWriter
from .training.signals import StopSignals
from .training.update import NotFiniteError, Update, Updater, not_finite

logger = logging.getLogger(__name__)

ROOT = "result/pretrain"  # s3prl's folder of runs


def extended(base: type, typed: frozenset[str] = frozenset()) -> type:
    """The Runner of ``-u ekd`` over s3prl's own, from the installed package or from a checkout.

    Args:
        base: s3prl's ``pretrain.runner.Runner``.
        typed: the keys of the config that ``-o`` sets at this start.
    """
    return type("Runner", (EkdRunner, base), {"typed": typed})


def resume_command(args) -> str:
    """What to type to go on with a run, from its arguments."""
    name, folder = str(args.expname), str(args.expdir)
    where = f"-n {shlex.quote(name)}" if folder == f"{ROOT}/{name}" else f"-p {shlex.quote(folder)}"
    return f"run_pretrain.py -u {args.upstream} {where} -a"


class EkdRunner:
    """Stands before s3prl's Runner, which makes the upstream, the optimizer and the schedule.

    Args:
        args: s3prl's arguments; ``init_ckpt`` is the checkpoint to go on from, or None.
        config: the runner config, as YAML has it.

    Raises:
        EkdError: one sentence for what the user can mend.
    """

    typed: frozenset[str] = frozenset()

    def __init__(self, args, config):
        self.args, self.config = args, config
        self.settings = check_runner_config(config, "the config of the run").runner
        self.device = str(args.device)
        self.processes = Processes()
        self.hint = f"go on with: {resume_command(args)}"
        self.saves = RunSaves(args.expdir, self.settings.max_keep, self.hint)
        self.init_ckpt = read_run(args.init_ckpt) if args.init_ckpt else {}
        self.upstream = self._get_upstream()
        where = str(args.init_ckpt)
        self.progress = resumed_progress(self.init_ckpt, where, self.upstream, self.typed)
        resumed = bool(self.init_ckpt)
        self.logger = ScalarWriter(args.expdir, self.progress.step if resumed else None)
        if resumed and self.processes.writer:
            self.saves.tidy(self.progress.step)
        self.updater = self._updater()
        # Last: whatever was drawn while all this was made is forgotten.
        resume_random(self.init_ckpt, where, self.processes, self.device)
        self.init_ckpt = {}

    def _updater(self) -> Updater:
        run = self.settings
        half = run.fp16 and self.device.startswith("cuda")
        if run.fp16 and not half:
            logger.warning("runner.fp16 needs a CUDA device: training in float32")
        self.autocast = torch.autocast("cuda", dtype=torch.float16, enabled=half)
        scaler = torch.amp.GradScaler("cuda", enabled=half)
        if self.progress.scaler:
            scaler.load_state_dict(self.progress.scaler)
        model, states = self.upstream.model, self.init_ckpt
        self.init_ckpt = {}  # s3prl would load the states in its own way
        optimizer = self._get_optimizer([model])
        if states:
            resume_optimizer(optimizer, states, self.args.init_ckpt)
        scheduler = self._get_scheduler(optimizer) if self.config.get("scheduler") else None
        if states and scheduler is not None:
            resume_scheduler(scheduler, optimizer, self.progress.step)
        self.init_ckpt = states
        clipping, each = run.gradient_clipping, run.gradient_accumulate_steps
        return Updater(model, optimizer, scheduler, scaler, clipping, each)

    # Training

    def train(self) -> None:
        """Train to ``total_steps``.

        Raises:
            EkdError: one sentence for what the user can mend.
            SystemExit: a signal asked to stop; the code is 128 and its number, and all is saved.
        """
        run, place = self.settings, self.progress
        self.upstream.train()
        size = self.upstream.data.train_batch_size * run.gradient_accumulate_steps
        print(f"[Runner] - Accumulated batch size: {size}")
        passes = run.total_steps * run.gradient_accumulate_steps / place.batches
        print(f"[Runner] - Training for {run.total_steps} steps, {passes:.1f} passes over the data")
        self._between_updates()
        self._saved_step, self._saved_at = place.step, time.monotonic()
        bar = tqdm(total=run.total_steps, initial=place.step, dynamic_ncols=True, desc="overall")
        with bar, StopSignals() as stop, workers_explained(self.hint):
            try:
                batches = self._batches()
                while place.step < run.total_steps:
                    self._finish(self._update(batches), stop)
                    bar.update()
            except (SaveError, NotFiniteError):
                raise
            except Exception:
                self._rescue()
                raise
            finally:
                self.logger.flush()
        if place.skipped:
            logger.warning("%d updates of this run were skipped: not finite", place.skipped)

    def _batches(self) -> Iterator[Batch]:
        """Batch after batch, pass after pass. What was used before a resume is not read again."""
        while True:
            for batch in self.upstream.get_train_dataloader():
                self._batch += self.processes.count
                yield batch
            self._epoch, self._batch = self._epoch + 1, 0

    def _update(self, batches: Iterator[Batch]) -> Update:
        """The batches of one update, and the update."""
        step, every = self.progress.step + 1, self.settings.log_step
        self.updater.begin()
        self._new = defaultdict(list)
        for _ in range(self.settings.gradient_accumulate_steps):
            batch = next(batches)
            with memory_explained(step, batch, self.device, self.hint):
                with self.autocast:
                    loss, _ = self.upstream(batch, self._new, global_step=step, log_step=every)
                self.updater.backward(loss, batch)
        self._whole = False
        with memory_explained(step, batch, self.device, self.hint):
            return self.updater.update()

    def _finish(self, update: Update, stop: StopSignals) -> None:
        """All that is done between two updates: count, log, measure, save, leave."""
        run, place = self.settings, self.progress
        place.step += 1
        place.epoch, place.batch = self._epoch, self._batch
        self._count(update)
        self._between_updates()
        last = place.step == run.total_steps
        if place.step % run.log_step == 0 or last:
            self._log(update)
        measured = self.upstream.dev_dataloader is not None
        if measured and (place.step % (run.eval_step or run.save_step) == 0 or last):
            self._measure()
        minutes = (time.monotonic() - self._saved_at) / 60
        stopping = self.processes.any(stop.received is not None) and not last
        if place.step % run.save_step == 0 or last:
            path = self.saves.numbered(self._states(), place.step)
            tqdm.write(f"[Runner] - Save the checkpoint to: {path}")
            self._saved_step, self._saved_at = place.step, time.monotonic()
        elif stopping or self.processes.any(0 < run.last_minutes <= minutes):
            self.saves.last(self._states())
            self._saved_step, self._saved_at = place.step, time.monotonic()
        if stopping:
            said = f"stopped by {stop.received.name} at step {place.step} of {run.total_steps}"
            tqdm.write(f"{said}, all saved; {self.hint}", file=sys.stderr)
            raise SystemExit(stop.exit_code)

    def _count(self, update: Update) -> None:
        """Keep what an update has to tell; stop after too many that were not made.

        Raises:
            NotFiniteError: naming the utterances.
        """
        place, names = self.progress, self.updater.names
        if update.made:
            place.skipped_in_a_row = 0
            for name, values in self._new.items():
                place.records[name] += values
            return
        place.skipped += 1
        place.skipped_in_a_row += 1
        level = logging.INFO if update.scaling else logging.WARNING
        logger.log(
            level,
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
        scalars = {"loss": update.loss, "lr": self.updater.rate(), "gradient-norm": update.norm}
        if place.skipped:
            scalars["skipped"] = place.skipped
        for name, value in scalars.items():
            self.logger.add_scalar(prefix + name, value, global_step=place.step)
        self.upstream.log_records(
            records=place.records, logger=self.logger, prefix=prefix, global_step=place.step
        )
        place.records = defaultdict(list)

    def _measure(self) -> None:
        """The dev loss; the checkpoint of the lowest is kept apart."""
        place = self.progress
        with self.autocast:
            loss = dev_loss(self.upstream, self.upstream.dev_dataloader, place.step, self.device)
        self.logger.add_scalar(f"{self.args.upstream}/dev-loss", loss, global_step=place.step)
        better = math.isfinite(loss) and (place.best_loss is None or loss < place.best_loss)
        tqdm.write(f"[Runner] - dev loss {loss:.5f} at step {place.step}{', the best' * better}")
        if better:
            place.best_loss, place.best_step = loss, place.step
            self.saves.best(self._states())

    # Saving

    def _between_updates(self) -> None:
        """Note what an update in the making changes before it is done."""
        self._epoch, self._batch = self.progress.epoch, self.progress.batch
        self._random = random_states(self.device)
        self._learned = self.upstream.batches_learned
        self._whole = True

    def _states(self) -> dict:
        """A checkpoint: s3prl's keys, the adapter's, and the Runner's own under one."""
        self.logger.flush()  # or a killed run would lack points from before its checkpoint
        self.progress.scaler = self.updater.scaler.state_dict()
        states = {
            "Optimizer": self.updater.optimizer.state_dict(),
            "Step": self.progress.step - 1,  # as s3prl counts it; the adapter adds the one
            "Args": self.args,
            "Config": self.config,
            KEY: self.progress.packed(self.processes.gather(self._random)),
        }
        if self.updater.scheduler is not None:
            states["Scheduler"] = self.updater.scheduler.state_dict()
        return self.upstream.add_state_to_save(states)

    def _rescue(self) -> None:
        """Something failed: save the last step that is whole, if it still is."""
        learned = self.upstream.batches_learned != self._learned
        if self._saved_step == self.progress.step or not self._whole or learned:
            return
        try:
            logger.warning("saved step %d: %s", self.progress.step, self.saves.last(self._states()))
        except Exception as error:  # what failed is told after this, and matters more
            logger.warning("step %d could not be saved: %s", self.progress.step, error)
