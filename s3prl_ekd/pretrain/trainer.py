"""s3prl's pretrain Runner for long runs: exact resume, several processes, dev loss, bad audio.

The step is s3prl's (forward, accumulate, clip, update, log), and so are the numbers. A checkpoint
holds all that the next step depends on, so that a run which was killed and resumed ends with the
weights of one which was not, bit for bit on one kind of machine.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn
from tqdm import tqdm

from ..data.batches import Batch
from ..errors import CheckpointError, SetupError
from ..files.run_checkpoints import LAST, read_run
from .bad_audio import BadAudioList, UsableBatches, stored
from .checkpoints import KEY, RunSaves, SaveError
from .distributed import Processes, join, lost_another, mean_records
from .interrupts import StoppedWaiting, StopSignals, exit_code, memory_explained, workers_explained
from .optim import NotFiniteError, Update, autocast, make_updater, not_finite
from .resume import random_numbers_untouched, random_states, resume_random, resumed_progress
from .settings import check_runner_config
from .tensorboard import NoWriter, ScalarWriter


@torch.no_grad()
def dev_loss(
    upstream: nn.Module, loader: Iterable[Batch], step: int, device: str
) -> tuple[float, float]:
    """The loss over the dev tables, each batch weighted by its samples: the sum, and the weights'.

    Without dropout, and with the same excerpts and distortions at every call. Neither the random
    numbers of the training nor its running statistics know that it took place.

    Args:
        upstream: the adapter; in train mode before and after.
        loader: its dev batches.
        step: updates done; teacher weights may follow from it.
        device: of the run.
    """
    total = samples = 0.0
    upstream.eval()
    try:
        with random_numbers_untouched(device):
            for batch in tqdm(loader, dynamic_ncols=True, desc="dev", leave=False):
                loss, _ = upstream(batch, defaultdict(list), global_step=step, log_step=step + 1)
                weight = float(batch.lengths.sum())
                total += loss.item() * weight
                samples += weight
    finally:
        upstream.train()
    return total, samples


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


class EkdRunner(Reports):
    """Stands before s3prl's Runner, which makes the upstream, the optimizer and the schedule.

    Args:
        args: s3prl's arguments; ``init_ckpt`` is the checkpoint to go on from, or None.
        config: the runner config, as YAML has it.

    Raises:
        EkdError: one sentence for what the user can mend.
    """

    typed: frozenset[str] = frozenset()

    def __init__(self, args, config):
        args.override = None  # it is in the config; the next resume would take it for new
        self.args, self.config = args, config
        self.settings = check_runner_config(config, "the config of the run").runner
        self.device = str(args.device)
        self.processes = join(self.device)
        self.hint = f"go on with: {resume_command(args)}"
        self.saves = RunSaves(args.expdir, self.settings.max_keep, self.hint)
        self.init_ckpt = read_run(args.init_ckpt) if args.init_ckpt else {}
        self.upstream = self._get_upstream()
        self.upstream.prepare(self.settings)
        where = str(args.init_ckpt)
        self.progress = resumed_progress(
            self.init_ckpt, where, self.upstream, self.typed, self.processes
        )
        self._check_together()
        self.bad, self.logger = self._bad_audio(where), NoWriter()
        self.stop = StopSignals(quiet=not self.processes.writer)
        if self.processes.writer:
            self.logger = ScalarWriter(args.expdir, self.progress.step if self.init_ckpt else None)
            if self.init_ckpt:
                self.saves.tidy(self.progress.step)
        if self.processes.count > 1:
            self._share()
        self.autocast = autocast(self.settings, self.device)
        states, self.init_ckpt = self.init_ckpt, {}  # s3prl would load them in its own way
        self.updater = make_updater(self, states)
        # Last: whatever was drawn while all this was made is forgotten.
        if not resume_random(states, where, self.processes, self.device):
            self.processes.own_random_numbers(args.seed)

    def _bad_audio(self, where: str) -> BadAudioList:
        """One process has the list so far; each adds what it finds."""
        if not self.processes.writer:
            return BadAudioList(self.args.expdir, [])
        loaders = (self.upstream.dataloader, self.upstream.dev_dataloader)
        datasets = [loader.dataset for loader in loaders if loader is not None]
        listed = self.init_ckpt.get(KEY, {}).get("bad_audio")
        return BadAudioList(self.args.expdir, datasets, listed, where)

    def _check_together(self) -> None:
        """Each process finds the checkpoint and the tables by itself: refuse different ones."""
        place = self.progress
        mine = (place.step, place.epoch, place.batch, place.batches, place.tables)
        every = self.processes.gather(mine)
        if any(each != every[0] for each in every):
            raise SetupError(
                "the processes of this run do not stand at the same step of the same data (steps "
                f"{', '.join(str(each[0]) for each in every)}); working folder and corpus tables "
                "must be the same for all of them"
            )

    def _share(self) -> None:
        """Several processes: gradients are averaged, the dev tables dealt out."""
        self.upstream.steps.share(self.device)
        if self.upstream.dev_dataloader is not None:
            sampler = self.upstream.dev_dataloader.sampler
            sampler.rank, sampler.processes = self.processes.rank, self.processes.count

    # Training

    def train(self) -> None:
        """Train to ``total_steps``.

        Raises:
            EkdError: one sentence for what the user can mend.
            SystemExit: a signal asked to stop; the code is 128 and its number, and all is saved.
        """
        run, place = self.settings, self.progress
        self.upstream.train()
        batches = run.gradient_accumulate_steps * self.processes.count
        size = self.upstream.data.train_batch_size * batches
        passes = run.total_steps * batches / place.batches
        if self.processes.writer:
            most = "at most " if self.upstream.data.max_seconds else ""
            print(f"[Runner] - Accumulated batch size: {most}{size}")
            print(f"[Runner] - Training for {run.total_steps} steps, {passes:.1f} passes")
        self._between_updates()
        self._saved_step, self._saved_at = place.step, time.monotonic()
        quiet = not self.processes.writer
        bar = tqdm(
            total=run.total_steps,
            initial=place.step,
            dynamic_ncols=True,
            desc="overall",
            disable=quiet,
        )
        closing = contextlib.closing(self.upstream)
        with bar, self.stop, closing, workers_explained(self.hint):
            try:
                batches = self._batches()
                if place.dev_due and self.upstream.dev_dataloader is not None:
                    self._measure_and_save()
                while place.step < run.total_steps:
                    self._finish(self._update(batches))
                    bar.update()
            except (SaveError, NotFiniteError):
                raise
            except StoppedWaiting:
                # Of several processes the first one is waiting too, perhaps for this one.
                self._stopped(self.stop.received.name, self._rescue(wait=0))
            except Exception as error:
                waited = self.stop.waited()
                saved = self._rescue()
                if self.processes.count > 1 and lost_another(error):
                    if waited and self.stop.received is not None:
                        self._stopped(self.stop.received.name, saved)
                    raise SetupError(
                        f"another process of this run has ended after step {place.step}, its own "
                        f"message says why; {self.hint}"
                    ) from None
                raise
            finally:
                self.logger.flush()
                if self.processes.writer:
                    self.bad.write()
        if place.skipped and self.processes.writer:
            logger.warning("%d updates of this run were skipped: not finite", place.skipped)

    def _batches(self) -> Iterator[Batch]:
        """Batch after batch, pass after pass. What was used before a resume is not read again.

        A batch of bad audio only is passed over, but counted: the place in the data is of batches
        as the sampler gives them. Of several processes each takes part in each step, with an empty
        batch too.
        """
        count, unusable = self.processes.count, 0
        while True:
            for batch in self.stop.batches(self.upstream.get_train_dataloader()):
                self.bad.found(batch.bad, self._epoch)
                passes, self._batch = divmod(self._batch + count, self.progress.batches)
                self._epoch += passes
                unusable = 0 if batch.names else unusable + 1
                if unusable >= self.progress.batches:
                    raise self.bad.nothing_left("the data")
                if batch.names or count > 1:
                    yield batch._replace(bad=())

    def _update(self, batches: Iterator[Batch]) -> Update:
        """The batches of one update, and the update."""
        step, every = self.progress.step + 1, self.settings.log_step
        self.updater.begin()
        self._new = defaultdict(list)
        left = self.settings.gradient_accumulate_steps
        while left:
            left -= 1
            batch = next(batches)
            own = self.upstream.steps.own_gradients() if left else contextlib.nullcontext()
            with own, memory_explained(step, batch, self.device, self.hint):
                with self.autocast:
                    loss, _ = self.upstream(batch, self._new, global_step=step, log_step=every)
                self.updater.backward(loss, batch)
        with memory_explained(step, batch, self.device, self.hint):
            self.updater.clip()
            self._whole = False
            return self.updater.update()

    def _finish(self, update: Update) -> None:
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
        place.dev_due = measured and (place.step % (run.eval_step or run.save_step) == 0 or last)
        self._measure_and_save()

    def _measure_and_save(self) -> None:
        """What is done once a step is counted, or when a run that was stopped before it goes on."""
        run, place = self.settings, self.progress
        last = place.step == run.total_steps
        if place.dev_due:
            self._measure()
        minutes = (time.monotonic() - self._saved_at) / 60
        received = self.processes.first(self.stop.received and self.stop.received.name)
        stopping = received is not None and not last
        if place.step % run.save_step == 0 or last:
            states = self._states()
            if self.processes.writer:
                path = self.saves.numbered(states, place.step)
                tqdm.write(f"[Runner] - Save the checkpoint to: {path}")
            self._saved_step, self._saved_at = place.step, time.monotonic()
        elif stopping or self.processes.any(0 < run.last_minutes <= minutes):
            states = self._states()
            if self.processes.writer:
                self.saves.last(states)
            self._saved_step, self._saved_at = place.step, time.monotonic()
        if stopping or last:
            # torchrun ends those that are left half a minute after the first one leaves.
            self.processes.any(False)
        if stopping:
            self._stopped(received)

    def _stopped(self, received: str, saved: bool = True) -> NoReturn:
        """Leave with the signal's exit code, and say where the run stands."""
        if self.processes.writer:
            what = "all saved" if saved else f"saved at step {self._saved_step}"
            at = f"step {self.progress.step} of {self.settings.total_steps}"
            tqdm.write(f"stopped by {received} at {at}, {what}; {self.hint}", file=sys.stderr)
        raise SystemExit(exit_code(received))

    # Saving

    def _between_updates(self) -> None:
        """Note what an update in the making changes before it is done."""
        self._epoch, self._batch = self.progress.epoch, self.progress.batch
        self._random = random_states(self.device)
        self._learned = self.upstream.batches_learned
        self.bad.commit()
        self._whole = True

    def _states(self, alone: bool = False) -> dict:
        """A checkpoint: s3prl's keys, the adapter's, and the Runner's own under one.

        Args:
            alone: do not ask the other processes for what is theirs; they may not be there.
        """
        self.logger.flush()  # or a killed run would lack points from before its checkpoint
        processes = Processes() if alone else self.processes
        if not alone:
            self._share_records()
        self.progress.scaler = self.updater.scaler.state_dict()
        states = {
            "Optimizer": self.updater.optimizer.state_dict(),
            "Step": self.progress.step - 1,  # as s3prl counts it; the adapter adds the one
            "Args": self.args,
            "Config": self.config,
            KEY: {
                **self.progress.packed(processes.gather(self._random)),
                "bad_audio": stored(self.bad.gathered(processes.gather(self.bad.packed()))),
            },
        }
        if self.updater.scheduler is not None:
            states["Scheduler"] = self.updater.scheduler.state_dict()
        return self.upstream.add_state_to_save(states)

    def _rescue(self, wait: float = 3) -> bool:
        """Something failed: save the last step that is whole, if it still is.

        If the process that writes is the one that is lost, the second one does it.

        Args:
            wait: seconds that the second one gives the first one for it.

        Returns:
            Whether that step is saved.
        """
        step = self.progress.step
        if self._saved_step == step:
            return True
        learned = self.upstream.batches_learned != self._learned
        if not self._whole or learned or self.processes.rank > 1:
            return False
        try:
            if self.processes.count > 1:
                end = time.monotonic() + (0 if self.processes.writer else wait)
                while not (saved := self._saved_by_another()) and time.monotonic() < end:
                    time.sleep(1)
                if saved:
                    return True
            path = self.saves.last(self._states(alone=True))
            logger.warning("saved step %d: %s", step, path)
        except Exception as error:  # what failed is told after this, and matters more
            logger.warning("step %d could not be saved: %s", step, error)
            return False
        return True

    def _saved_by_another(self) -> bool:
        path = self.saves.folder / LAST
        try:
            return path.exists() and read_run(path)["Step"] >= self.progress.step
        except CheckpointError:  # damaged: not saved
            return False
