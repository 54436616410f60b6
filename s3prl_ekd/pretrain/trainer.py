"""Train a student: set-up, loop, step, log, dev loss, checkpoints, rescue. Read it top to bottom.

The step is that of s3prl's pretrain Runner (forward, accumulate, clip, update, log), with the same
numbers. A checkpoint holds all that the next step depends on: a run that was killed and resumed
ends with the weights of an uninterrupted one, bit for bit on the same kind of machine.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from torch import nn
from tqdm import tqdm

from ..data.batches import Batch
from ..errors import CheckpointError, DataError, SetupError
from ..files.atomic import write_text
from ..files.config import plain, read_yaml
from ..files.run_checkpoints import LAST, read_run
from ..request import PretrainRequest
from .bad_audio import BadAudioList, UsableBatches, as_tensor
from .checkpoints import KEY, CheckpointManager, SaveError
from .distributed import (
    Processes,
    distiller_batch,
    distribute,
    is_lost_process,
    join,
    mean_records,
    no_sync,
)
from .expert import UpstreamPretrainExpert
from .interrupts import StoppedWaiting, StopSignals, exit_code, memory_explained, workers_explained
from .optim import (
    NotFiniteError,
    OptimizerStep,
    StepResult,
    autocast,
    fused_adamw,
    loss_scaler,
    not_finite,
    warmup_schedule,
)
from .resume import (
    random_numbers_untouched,
    random_states,
    resume_optimizer,
    resume_random,
    resume_scheduler,
    resumed_progress,
)
from .settings import FUSED_ADAMW, check_runner_config, load_model_config
from .tensorboard import NoWriter, ScalarWriter

logger = logging.getLogger(__name__)


class Trainer:
    """Train to ``total_steps``, from random weights or from a checkpoint.

    s3prl's script makes one in the place of its own Runner, and calls ``train()`` and
    ``logger.close()``.

    Args:
        args: s3prl's arguments; ``init_ckpt`` is the checkpoint to resume from, or None.
        config: the runner config, as YAML has it.
        s3prl_runner: s3prl's ``pretrain.runner.Runner``, installed or from a checkout. Its methods
            make the upstream, s3prl's optimizers and its schedules, from ``args``, ``config`` and
            ``init_ckpt`` of this object.
        overridden: the keys of the config that ``-o`` sets at this start.

    Attributes:
        upstream: teachers, student, heads and batches, as s3prl's interface has them.
        distiller: what gives a batch's loss; under DistributedDataParallel in several processes.
        progress: of the last step that is done; see :class:`.checkpoints.Progress`.

    Raises:
        EkdError: one sentence for what the user can mend.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        config: dict[str, Any],
        s3prl_runner: Any,
        overridden: Collection[str] = (),
    ):
        args.override = None  # it is in the config; the next resume would apply it again
        self.args, self.config, self.s3prl_runner = args, config, s3prl_runner
        self.settings = check_runner_config(config, "the config of the run").runner
        self.device = str(args.device)
        self.processes = join(self.device)
        self.hint = f"go on with: {resume_command(args)}"
        self.checkpoints = CheckpointManager(args.expdir, self.settings.max_keep, self.hint)

        checkpoint = read_run(args.init_ckpt) if args.init_ckpt else {}
        path = str(args.init_ckpt)
        self.init_ckpt = checkpoint
        self.upstream: UpstreamPretrainExpert = s3prl_runner._get_upstream(self)
        self.upstream.prepare(self.settings)
        self.progress = resumed_progress(
            checkpoint, path, self.upstream, overridden, self.processes
        )
        self._epoch, self._batch = self.progress.epoch, self.progress.batch  # of the next batch
        self.check_same_progress()
        self.bad_audio = self.make_bad_audio_list(checkpoint, path)
        self.stop = StopSignals(quiet=not self.processes.writer)
        self.logger: ScalarWriter | NoWriter = NoWriter()
        if self.processes.writer:
            self.logger = ScalarWriter(args.expdir, self.progress.step if checkpoint else None)
            if checkpoint:
                self.checkpoints.prune(self.progress.step)

        self.distiller: nn.Module = self.upstream.distiller
        if self.processes.count > 1:
            self.distiller = distribute(self.upstream.distiller, self.device)
            if self.upstream.dev_dataloader is not None:
                sampler = self.upstream.dev_dataloader.sampler
                sampler.rank, sampler.processes = self.processes.rank, self.processes.count
        self.autocast = autocast(self.settings, self.device)
        self.init_ckpt = {}  # s3prl would load optimizer and schedule in its own way
        self.optimizer_step = self.make_optimizer_step(checkpoint)
        # Last: random numbers drawn during set-up do not count.
        if not resume_random(checkpoint, path, self.processes, self.device):
            self.processes.seed_by_rank(args.seed)
        if not args.init_ckpt and self.processes.writer:
            write_model_config(args)

    def check_same_progress(self) -> None:
        """Each process reads checkpoint and tables by itself: refuse different ones."""
        progress = self.progress
        positions = self.processes.all_gather(
            (progress.step, progress.epoch, progress.batch, progress.batches, progress.tables)
        )
        if any(position != positions[0] for position in positions):
            raise SetupError(
                "the processes of this run do not stand at the same step of the same data (steps "
                f"{', '.join(str(step) for step, *_ in positions)}); working folder and corpus "
                "tables must be the same for all of them"
            )

    def make_bad_audio_list(self, checkpoint: Mapping[str, Any], path: str) -> BadAudioList:
        """The first process resumes the list; each process adds what it finds."""
        if not self.processes.writer:
            return BadAudioList(self.args.expdir, [])
        loaders = (self.upstream.dataloader, self.upstream.dev_dataloader)
        datasets = [loader.dataset for loader in loaders if loader is not None]
        saved = checkpoint.get(KEY, {}).get("bad_audio")
        return BadAudioList(self.args.expdir, datasets, saved, path)

    def make_optimizer_step(self, checkpoint: Mapping[str, Any]) -> OptimizerStep:
        """Optimizer, schedule and loss scale, new or as in the checkpoint.

        Raises:
            CheckpointError: the checkpoint's optimizer does not fit.
            SetupError: torch refuses the optimizer's settings.
        """
        run, config = self.settings, self.config["optimizer"]
        model, fused = self.upstream.model, config["name"] == FUSED_ADAMW
        scaler = loss_scaler(run, self.device)
        if self.progress.scaler:
            scaler.load_state_dict(self.progress.scaler)
        try:
            if fused:
                optimizer = fused_adamw(model, config)
            else:
                optimizer = self.s3prl_runner._get_optimizer(self, [model])
        except (TypeError, ValueError, AttributeError) as error:
            raise SetupError(f"optimizer {config} cannot be made: {error}") from None
        if checkpoint:
            resume_optimizer(optimizer, checkpoint, self.args.init_ckpt)
        scheduler = None
        if self.config.get("scheduler"):
            scheduler = self.s3prl_runner._get_scheduler(self, optimizer)
        elif fused:
            scheduler = warmup_schedule(optimizer, config, run.total_steps)
        if checkpoint and scheduler is not None:
            resume_scheduler(scheduler, optimizer, self.progress.step)
        return OptimizerStep(model, optimizer, scheduler, scaler, run, self.processes)

    # Loop

    def train(self) -> None:
        """Train to ``total_steps``.

        Raises:
            EkdError: one sentence for what the user can mend.
            SystemExit: a signal asked to stop; the code is 128 and its number, and all is saved.
        """
        run, progress = self.settings, self.progress
        self.upstream.train()
        self.print_plan()
        self.snapshot()
        self._saved_step, self._saved_at = progress.step, time.monotonic()
        bar = tqdm(
            total=run.total_steps,
            initial=progress.step,
            dynamic_ncols=True,
            desc="overall",
            disable=not self.processes.writer,
        )
        closing = contextlib.closing(self.upstream)
        with bar, self.stop, closing, workers_explained(self.hint), self.rescued():
            batches = self.batches()
            if progress.dev_due and self.upstream.dev_dataloader is not None:
                self.measure_dev_loss()
                self.save_or_stop()
            while progress.step < run.total_steps:
                result = self.train_step(batches)
                self.count(result)
                self.snapshot()
                if self.is_due(run.log_step):
                    self.log(result)
                progress.dev_due = self.is_dev_due()
                if progress.dev_due:
                    self.measure_dev_loss()
                self.save_or_stop()
                bar.update()
        if progress.skipped and self.processes.writer:
            logger.warning("%d updates of this run were skipped: not finite", progress.skipped)

    def print_plan(self) -> None:
        run = self.settings
        batches = run.gradient_accumulate_steps * self.processes.count  # of a step
        size = self.upstream.data.train_batch_size * batches
        passes = run.total_steps * batches / self.progress.batches
        if self.processes.writer:
            most = "at most " if self.upstream.data.max_seconds else ""
            print(f"[Runner] - Accumulated batch size: {most}{size}")
            print(f"[Runner] - Training for {run.total_steps} steps, {passes:.1f} passes")

    def is_due(self, every: int) -> bool:
        """Whether something is done after this step: each so many steps, and after the last."""
        return self.progress.step % every == 0 or self.progress.step == self.settings.total_steps

    def is_dev_due(self) -> bool:
        has_dev = self.upstream.dev_dataloader is not None
        return has_dev and self.is_due(self.settings.eval_step or self.settings.save_step)

    def batches(self) -> Iterator[Batch]:
        """The training batches, epoch after epoch, from the position after the last step's.

        The position counts batches as the sampler gives them: a batch of which no utterance is
        usable is counted, but not used. Of several processes each takes part in each step, with an
        empty batch too.

        Raises:
            DataError: an utterance could not be read, or none of a whole epoch is usable.
        """
        count, unusable = self.processes.count, 0
        while True:
            for batch in self.stop.batches(self.upstream.get_train_dataloader()):
                self.bad_audio.record(batch.bad, self._epoch)
                epochs, self._batch = divmod(self._batch + count, self.progress.batches)
                self._epoch += epochs
                if batch.problem:
                    raise DataError(batch.problem)
                unusable = 0 if batch.names else unusable + 1
                if unusable >= self.progress.batches:
                    raise self.bad_audio.nothing_left("the data")
                if batch.names or count > 1:
                    yield batch._replace(bad=())

    def train_step(self, batches: Iterator[Batch]) -> StepResult:
        """Add up the gradients of the step's batches, clip them, update the weights."""
        run, step = self.settings, self.progress.step + 1
        self.optimizer_step.begin()
        self._records = defaultdict(list)
        for remaining in reversed(range(run.gradient_accumulate_steps)):
            batch = next(batches)
            with (
                no_sync(self.distiller) if remaining else contextlib.nullcontext(),
                memory_explained(step, batch, self.device, self.hint),
            ):
                with self.autocast:
                    data = distiller_batch(batch, self.device)
                    loss, logs = self.distiller(data, step=step, detail=step % run.log_step == 0)
                self.optimizer_step.backward(loss, batch)
            if batch.names:
                self._records["loss_mean"].append(loss.detach())
            for name, value in logs.items():
                self._records[name].append(value)  # tensors: float() would wait for the device
        with memory_explained(step, batch, self.device, self.hint):
            self.optimizer_step.clip()
            self._unchanged = False
            return self.optimizer_step.update()

    def count(self, result: StepResult) -> None:
        """Count a step, record its scalars; a skipped one is warned of.

        Raises:
            NotFiniteError: after ``max_nonfinite`` skipped steps in a row; it names the utterances.
        """
        progress = self.progress
        progress.step += 1
        progress.epoch, progress.batch = self._epoch, self._batch
        if result.applied:
            progress.skipped_in_a_row = 0
            for name, values in self._records.items():
                progress.records[name] += values
            return
        by_process = self.processes.all_gather(self.optimizer_step.names)
        names = [name for names in by_process for name in names]
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        level = logging.INFO if result.lowers_scale else logging.WARNING
        logger.log(
            level if self.processes.writer else logging.DEBUG,
            "step %d skipped (%d in a row): loss %g, norm of the gradient %g, utterances %s",
            progress.step,
            progress.skipped_in_a_row,
            result.loss,
            result.norm,
            "not looked at: fp16 lowers its scale" if result.lowers_scale else ", ".join(names[:8]),
        )
        if progress.skipped_in_a_row >= self.settings.max_nonfinite:
            raise not_finite(progress.step, progress.skipped_in_a_row, names, self.hint)

    def snapshot(self) -> None:
        """Note random states and data position, which the next step changes before it is done."""
        self._epoch, self._batch = self.progress.epoch, self.progress.batch
        self._random = random_states(self.device)
        self._batches_learned = self.upstream.batches_learned
        self.bad_audio.commit()
        self._unchanged = True  # weights and optimizer, since the last step

    # Log

    def log(self, result: StepResult) -> None:
        """Write to TensorBoard, under s3prl's names: this step, and means since the last point."""
        progress, prefix = self.progress, f"{self.args.upstream}/train-"
        (loss,) = self.processes.sum(result.loss)
        self.gather_records()
        scalars = {
            "loss": loss / self.processes.count,
            "lr": self.optimizer_step.learning_rate(),
            "gradient-norm": result.norm,
        }
        if progress.skipped:
            scalars["skipped"] = progress.skipped
        for name, value in scalars.items():
            self.logger.add_scalar(prefix + name, value, global_step=progress.step)
        self.upstream.log_records(
            records=progress.records, logger=self.logger, prefix=prefix, global_step=progress.step
        )
        progress.records = defaultdict(list)

    def gather_records(self) -> None:
        """Average the scalars since TensorBoard's last point over the processes."""
        if self.processes.count == 1:
            return
        records = {
            name: torch.stack([value.float().cpu() for value in values]).tolist()
            for name, values in self.progress.records.items()
        }
        means = mean_records(self.processes.all_gather(records))
        self.progress.records = defaultdict(
            list, {name: list(torch.tensor(values)) for name, values in means.items()}
        )

    def measure_dev_loss(self) -> None:
        """Measure the dev loss; save the best checkpoint if it is the lowest."""
        progress = self.progress
        assert self.upstream.dev_dataloader is not None
        batches = UsableBatches(
            self.upstream.dev_dataloader, self.bad_audio, progress.epoch, self.stop.batches
        )
        with self.autocast:
            sums = dev_loss(self.upstream, batches, progress.step, self.device)
        self.bad_audio.commit()
        total, samples = self.processes.sum(*sums)
        if not samples:
            raise self.bad_audio.nothing_left("dev_sets")
        loss = total / samples
        self.logger.add_scalar(f"{self.args.upstream}/dev-loss", loss, global_step=progress.step)
        progress.dev_due = False  # in the best checkpoint, too
        best = progress.best_loss is None or loss < progress.best_loss
        best = best and math.isfinite(loss)
        if self.processes.writer:
            suffix = ", the best" * best
            tqdm.write(f"[Runner] - dev loss {loss:.5f} at step {progress.step}{suffix}")
        if best:
            progress.best_loss, progress.best_step = loss, progress.step
            checkpoint = self.checkpoint()
            if self.processes.writer:
                self.checkpoints.save_best(checkpoint)

    # Save

    def save_or_stop(self) -> None:
        """Save a checkpoint if one is due; exit if a signal asked for it."""
        run, step = self.settings, self.progress.step
        minutes = (time.monotonic() - self._saved_at) / 60
        received = self.processes.first(self.stop.received and self.stop.received.name)
        last = step == run.total_steps
        stopping = received is not None and not last
        if self.is_due(run.save_step):
            checkpoint = self.checkpoint()
            if self.processes.writer:
                path = self.checkpoints.save_numbered(checkpoint, step)
                tqdm.write(f"[Runner] - Save the checkpoint to: {path}")
            self._saved_step, self._saved_at = step, time.monotonic()
        elif stopping or self.processes.any(0 < run.autosave_minutes <= minutes):
            checkpoint = self.checkpoint()
            if self.processes.writer:
                self.checkpoints.save_last(checkpoint)
            self._saved_step, self._saved_at = step, time.monotonic()
        if stopping or last:
            # torchrun ends those that are left half a minute after the first one leaves.
            self.processes.barrier()
        if stopping:
            self.exit(received)

    def exit(self, received: str, saved: bool = True) -> NoReturn:
        """Exit with the code of a signal, and say which step is saved."""
        if self.processes.writer:
            what = "all saved" if saved else f"saved at step {self._saved_step}"
            at = f"step {self.progress.step} of {self.settings.total_steps}"
            tqdm.write(f"stopped by {received} at {at}, {what}; {self.hint}", file=sys.stderr)
        raise SystemExit(exit_code(received))

    def checkpoint(self, alone: bool = False) -> dict[str, Any]:
        """The last step as s3prl's keys, the upstream's, and the trainer's own under one.

        Args:
            alone: do not ask the other processes for their part; they may be gone.
        """
        self.logger.flush()  # or a killed run would lack points from before its checkpoint
        processes = Processes() if alone else self.processes
        if not alone:
            self.gather_records()
        self.progress.scaler = self.optimizer_step.scaler.state_dict()
        bad_audio = self.bad_audio.merge(processes.all_gather(self.bad_audio.state()))
        states = {
            "Optimizer": self.optimizer_step.optimizer.state_dict(),
            "Step": self.progress.step - 1,  # as s3prl counts it; the upstream adds the one
            "Args": self.args,
            "Config": self.config,
            KEY: {
                **self.progress.state_dict(processes.all_gather(self._random)),
                "bad_audio": as_tensor(bad_audio),
            },
        }
        if self.optimizer_step.scheduler is not None:
            states["Scheduler"] = self.optimizer_step.scheduler.state_dict()
        return self.upstream.add_state_to_save(states)

    # Rescue

    @contextlib.contextmanager
    def rescued(self) -> Iterator[None]:
        """Whatever ends the loop: save the last step first, flush the logs."""
        try:
            yield
        except (SaveError, NotFiniteError):
            raise
        except StoppedWaiting:
            # Of several processes the first one is waiting too, perhaps for this one.
            assert self.stop.received is not None
            self.exit(self.stop.received.name, self.rescue(wait=0))
        except Exception as error:
            waited = self.stop.waited()
            saved = self.rescue()
            if self.processes.count > 1 and is_lost_process(error):
                if waited and self.stop.received is not None:
                    self.exit(self.stop.received.name, saved)
                raise SetupError(
                    f"another process of this run has ended after step {self.progress.step}, its "
                    f"own message says why; {self.hint}"
                ) from None
            raise
        finally:
            self.logger.flush()
            if self.processes.writer:
                self.bad_audio.write()

    def rescue(self, wait: float = 3) -> bool:
        """Save the last step, if its weights and statistics are unchanged.

        If the process that writes is lost, the second one does it.

        Args:
            wait: seconds that the second one leaves to the first one.

        Returns:
            Whether that step is saved.
        """
        step = self.progress.step
        if self._saved_step == step:
            return True
        learned = self.upstream.batches_learned != self._batches_learned
        if not self._unchanged or learned or self.processes.rank > 1:
            return False
        try:
            if self.processes.count > 1:
                end = time.monotonic() + (0 if self.processes.writer else wait)
                while not (saved := self.is_saved_by_another()) and time.monotonic() < end:
                    time.sleep(1)
                if saved:
                    return True
            path = self.checkpoints.save_last(self.checkpoint(alone=True))
            logger.warning("saved step %d: %s", step, path)
        except Exception as error:  # the first error matters more, and is raised after this
            logger.warning("step %d could not be saved: %s", step, error)
            return False
        return True

    def is_saved_by_another(self) -> bool:
        path = self.checkpoints.folder / LAST
        try:
            return path.exists() and read_run(path)["Step"] >= self.progress.step
        except CheckpointError:  # damaged: not saved
            return False


@torch.no_grad()
def dev_loss(
    upstream: UpstreamPretrainExpert, loader: Iterable[Batch], step: int, device: str
) -> tuple[float, float]:
    """The loss over the dev tables, each batch weighted by its samples.

    Without dropout, and with the same excerpts and distortions at every call. Training's random
    states and running statistics stay as they are.

    Args:
        upstream: in train mode before and after.
        loader: the dev batches.
        step: steps done; teacher weights may follow from it.
        device: of the run.

    Returns:
        The weighted sum, and the sum of the weights.
    """
    total = samples = 0.0
    upstream.eval()
    try:
        with random_numbers_untouched(device):
            for batch in tqdm(loader, dynamic_ncols=True, desc="dev", leave=False):
                loss, _ = upstream.distiller(distiller_batch(batch, device), step=step)
                weight = float(batch.lengths.sum())
                total += loss.item() * weight
                samples += weight
    finally:
        upstream.train()
    return total, samples


def resume_command(args: argparse.Namespace) -> str:
    """The command that resumes a run, from its arguments."""
    name, folder = str(args.expname), str(args.expdir)
    default = f"{PretrainRequest.ROOT}/{name}"
    where = f"-n {shlex.quote(name)}" if folder == default else f"-p {shlex.quote(folder)}"
    return f"run_pretrain.py -u {args.upstream} {where} -a"


def write_model_config(args: argparse.Namespace) -> None:
    """Write the model config into the run's folder, with what it extends.

    s3prl has copied the file there, whose ``extends`` would point to nothing.
    """
    if "extends" in read_yaml(args.upstream_config):
        text = yaml.safe_dump(plain(load_model_config(args.upstream_config)), sort_keys=False)
        path = Path(args.expdir) / "config_model.yaml"
        write_text(path, f"# {args.upstream_config} with what it extends\n{text}")
