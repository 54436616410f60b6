"""The training loop: set-up, step, logging, dev loss, checkpoints, saving on errors.

A step is that of s3prl's pretrain Runner (forward, accumulate, clip, update, log) and gives the
same numbers. A checkpoint holds everything the next step depends on. A run that is killed and
resumed ends with the weights of an uninterrupted run, bit for bit on the same kind of machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import math
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from ..data.batch import Batch
from ..distill.frame_counts import FrameCounts
from ..errors import CheckpointError, SetupError, printable
from ..files.atomic import explain_write_errors, write_text
from ..files.config import to_plain_data
from ..files.renamed_keys import RUNNER, rename_keys
from ..files.run_checkpoints import LAST_CHECKPOINT, read_checkpoint
from ..request import PretrainRequest
from ..system import torchrun
from ..system.precision import allow_tf32, choose_training_precision
from ..system.random_states import preserve_random_states, random_states
from .bad_audio import BadAudioList, as_tensor
from .checkpoints import BEST_NAME, RUN_STATE_KEY, CheckpointManager, Progress, SaveError
from .config_diff import source_digests, table_digests
from .distributed import (
    ProcessGroup,
    distiller_batch,
    is_lost_process,
    join_process_group,
    mean_records,
    no_sync,
    wrap_ddp,
)
from .expert import UpstreamPretrainExpert
from .interrupts import (
    StoppedDevLoss,
    StoppedWaiting,
    StopSignals,
    exit_code,
    explain_out_of_memory,
    explain_worker_errors,
)
from .optim import (
    NotFiniteError,
    OptimizerStep,
    StepResult,
    UnreadStep,
    autocast,
    fused_adamw,
    not_finite_error,
    read_steps,
    warmup_schedule,
)
from .settings import FUSED_ADAMW, ModelFile, check_runner_config, saved_runner_config
from .tensorboard import ScalarWriter

logger = logging.getLogger(__name__)

# Steps without waiting for the device; also bounded by runner.max_nonfinite, log_step, save_step.
MAX_UNREAD = 20
AGREE_EVERY = 8  # dev batches after which several processes compare whether a signal has arrived
DEFAULT_SEED = 1337  # of s3prl's script


class Trainer:
    """Train to ``total_steps``, as a new run or from a checkpoint.

    Replaces s3prl's Runner in its script, which calls ``train()`` and ``logger.close()``.

    Args:
        args: s3prl's arguments; ``init_ckpt`` is the checkpoint to resume from, or None.
        config: the runner config, as loaded from YAML.
        s3prl_runner: s3prl's ``pretrain.runner.Runner``, installed or from a checkout. Its methods
            make the upstream and s3prl's optimizers and schedules. They read ``args``, ``config``
            and ``init_ckpt`` of this object.
        overridden: config keys that ``-o`` sets in this command.

    Attributes:
        upstream: teachers, student, heads and data loaders, behind s3prl's interface.
        distiller: computes the loss of a batch; wrapped in DistributedDataParallel if there are
            several processes.
        progress: state after the last completed step.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        config: dict[str, Any],
        s3prl_runner: Any,
        overridden: Collection[str] = (),
    ):
        args.override = None  # in the config already; the next resume would apply it again
        if not args.init_ckpt or hasattr(args, "overridden"):  # version 0.1 did not record them
            args.overridden = sorted({*getattr(args, "overridden", ()), *overridden})
        self.args, self.s3prl_runner = args, s3prl_runner
        self.device = str(args.device)
        self.processes = join_process_group(self.device)
        # Checkpoints have the new keys only, and the precision that the run began with.
        resumes_precision = args.init_ckpt and "precision" in config["runner"]
        self.config = saved_runner_config(config) if args.init_ckpt else rename_keys(config, RUNNER)
        run = check_runner_config(self.config, "the runner config").runner
        precision, reason = choose_training_precision(run.precision, self.device, resumes_precision)
        self.config["runner"]["precision"] = precision
        self.settings = dataclasses.replace(run, precision=precision)
        logger.info("precision: %s (%s)", precision, reason)
        allow_tf32(self.device, precision != "float32")
        self.hint = f"resume with: {resume_command(args, self.processes.world_size)}"
        self.checkpoints = CheckpointManager(args.expdir, self.settings.max_keep, self.hint)

        checkpoint = read_checkpoint(args.init_ckpt) if args.init_ckpt else {}
        path = str(args.init_ckpt)
        self.init_ckpt = checkpoint
        model_config = args.upstream_config  # s3prl replaces the path by the checkpoint's config
        self.upstream: UpstreamPretrainExpert = s3prl_runner._get_upstream(self)
        args.upstream_config = model_config
        self.upstream.prepare(self.settings)
        self.progress = new_progress(self.upstream)
        if checkpoint:
            from . import resume  # a new run does not need it

            self.progress = resume.resumed_progress(
                checkpoint, path, self.upstream, overridden, self.progress
            )
        self.upstream.dataloader.sampler.seek(
            self.progress.epoch,
            self.progress.batch,
            self.processes.rank,
            self.processes.world_size,
        )
        self._unread: list[tuple[int, UnreadStep, Mapping[str, list[Tensor]]]] = []
        # Position of the next batch.
        self._epoch, self._batch = self.progress.epoch, self.progress.batch
        self.check_same_progress()
        self.check_same_precision()
        is_main = self.processes.is_main
        # Only the main process lists the bad utterances of the tables and of the checkpoint.
        datasets = [loader.dataset for loader in self.upstream.loaders] if is_main else []
        saved = checkpoint.get(RUN_STATE_KEY, {}).get("bad_audio") if is_main else None
        self.bad_audio = BadAudioList(args.expdir, datasets, saved, path)
        self.stop_signals = StopSignals(quiet=not is_main)
        resume_step = self.progress.step if checkpoint else None
        self.logger = ScalarWriter(args.expdir if is_main else None, resume_step)
        if is_main and checkpoint:
            self.checkpoints.prune(self.progress.step, self.progress.best_loss is not None)

        self.distiller: nn.Module = self.upstream.distiller
        if self.processes.world_size > 1:
            self.distiller = wrap_ddp(self.upstream.distiller, self.device)
            if self.upstream.dev_dataloader is not None:
                sampler = self.upstream.dev_dataloader.sampler
                sampler.rank, sampler.processes = self.processes.rank, self.processes.world_size
        self.autocast = autocast(precision, self.device)
        # Empty, so that s3prl does not load optimizer and schedule: resume_optimizer does.
        self.init_ckpt = {}
        self.optimizer_step = self.make_optimizer_step(checkpoint)
        # Last, because set-up draws random numbers.
        if not (checkpoint and resume.resume_random(checkpoint, path, self.processes, self.device)):
            self.processes.seed_by_rank(args.seed)
        if is_main:
            write_configs(args, self.upstream.settings, self.config)

    def check_same_progress(self) -> None:
        """Raise SetupError if the processes have different checkpoints or length tables."""
        progress = self.progress
        tables = (progress.tables, progress.dev_tables)
        positions = self.processes.all_gather(
            (progress.step, progress.epoch, progress.batch, progress.batches, tables)
        )
        if any(position != positions[0] for position in positions):
            raise SetupError(
                "the processes of this run have different checkpoints or length tables (steps "
                f"{', '.join(str(step) for step, *_ in positions)}); run all of them in the same "
                "working folder, with the same tables"
            )

    def check_same_precision(self) -> None:
        """Raise SetupError if ``auto`` stands for different precisions in the processes."""
        own = (self.settings.precision, self.upstream.settings.teacher_precision)
        by_process = self.processes.all_gather(own)
        if any(other != own for other in by_process):
            names = sorted({name for pair in by_process for name in pair})
            raise SetupError(
                "the devices of this run's processes would compute in different precisions "
                f"({', '.join(names)}); set runner.precision and teacher_precision to one that all "
                "have, such as float32"
            )

    def make_optimizer_step(self, checkpoint: Mapping[str, Any]) -> OptimizerStep:
        """Make optimizer, schedule and loss scaler, with their states from the checkpoint, if any.

        Raises SetupError if torch rejects the optimizer's settings.
        """
        run, config = self.settings, self.config["optimizer"]
        model, fused = self.upstream.model, config["name"] == FUSED_ADAMW
        scaler = torch.amp.GradScaler("cuda", enabled=run.precision == "float16")
        if self.progress.scaler:
            scaler.load_state_dict(self.progress.scaler)
        try:
            if fused:
                optimizer = fused_adamw(model, config, self.upstream.settings.pruning)
            else:
                optimizer = self.s3prl_runner._get_optimizer(self, [model])
        except (TypeError, ValueError, AttributeError) as error:
            raise SetupError(f"cannot make the optimizer {config}: {error}") from None
        if checkpoint:
            from . import resume

            resume.resume_optimizer(optimizer, checkpoint, self.args.init_ckpt)
        scheduler = None
        if self.config.get("scheduler"):
            scheduler = self.s3prl_runner._get_scheduler(self, optimizer)
        elif fused:
            scheduler = warmup_schedule(optimizer, config, run.total_steps)
        if checkpoint and scheduler is not None:
            resume.resume_scheduler(scheduler, optimizer, self.progress.step)
        return OptimizerStep(model, optimizer, scheduler, scaler, run, self.processes)

    # Loop

    def train(self) -> None:
        """Train to ``total_steps``; exit with 128 + the number of a signal that stops the run."""
        run, progress = self.settings, self.progress
        self.upstream.train()
        self.print_plan()
        self.snapshot()
        self._saved_step, self._saved_at = progress.step, time.monotonic()
        options = {"dynamic_ncols": True, "desc": "overall", "disable": not self.processes.is_main}
        with (
            tqdm(total=run.total_steps, initial=progress.step, **options) as bar,
            self.stop_signals,
            contextlib.closing(self.upstream),
            explain_worker_errors(self.hint),
            self.save_on_error(),
        ):
            batches = self.batches()
            if progress.dev_due and self.has_dev:
                self.measure_dev_loss()
                self.save_or_stop()
            while progress.step < run.total_steps:
                self.record_step(self.train_step(batches))
                self.snapshot()
                if self.is_due(run.log_step):
                    bar.set_postfix_str(self.sparsity_text())
                    self.log(self.read_steps()[-1])
                elif len(self._unread) >= min(run.max_nonfinite, MAX_UNREAD):
                    self.read_steps()
                progress.dev_due = self.has_dev and self.is_due(run.eval_step or run.save_step)
                if progress.dev_due:
                    self.measure_dev_loss()
                self.save_or_stop()
                if self.is_due(run.save_step):
                    self.draw_widths()
                bar.update()
        if progress.skipped and self.processes.is_main:
            logger.warning(
                "%d steps of this run were skipped (loss or gradient not finite)", progress.skipped
            )

    def print_plan(self) -> None:
        run = self.settings
        batches = run.gradient_accumulate_steps * self.processes.world_size  # per step
        size = self.upstream.data.train_batch_size * batches
        epochs = run.total_steps * batches / self.progress.batches
        if self.processes.is_main:
            at_most = "at most " if self.upstream.data.max_seconds else ""
            print(f"[Runner] - Accumulated batch size: {at_most}{size}")
            print(f"[Runner] - Training for {run.total_steps} steps, {epochs:.1f} epochs")

    @property
    def has_dev(self) -> bool:
        return self.upstream.dev_dataloader is not None

    def is_due(self, interval: int) -> bool:
        """Whether this step is a multiple of ``interval``, or the last one."""
        step = self.progress.step
        return step % interval == 0 or step == self.settings.total_steps

    def batches(self) -> Iterator[Batch]:
        """Yield training batches, epoch after epoch, from where the last step ended.

        The position counts batches of the sampler, also those without a usable utterance. A single
        process skips such a batch. One of several yields it, because all take part in each step.
        An epoch without a usable utterance is an error.
        """
        count, unusable = self.processes.world_size, 0
        while True:
            loader: Iterable[Batch] = self.upstream.get_train_dataloader()
            if self.device.startswith("cuda"):
                from ..data.prefetch import prefetch

                loader = prefetch(loader, self.device)
            for read in self.stop_signals.batches(loader):
                batch = self.bad_audio.usable(read, self._epoch)
                epochs, self._batch = divmod(self._batch + count, self.progress.batches)
                self._epoch += epochs
                unusable = 0 if batch.names else unusable + 1
                if unusable >= self.progress.batches:
                    raise self.bad_audio.no_usable_audio("sets")
                if batch.names or count > 1:
                    yield batch

    def train_step(self, batches: Iterator[Batch]) -> UnreadStep:
        """Accumulate the gradients of the step's batches, clip them, update the weights."""
        run, step = self.settings, self.progress.step + 1
        self.optimizer_step.begin()
        self._step_records = defaultdict(list)
        count = run.gradient_accumulate_steps
        step_batches: Iterable[Batch] = (next(batches) for _ in range(count))
        counts, scale = None, 1.0
        if self.upstream.settings.loss.reduce == "frames":
            step_batches = list(step_batches)
            counts, scale = self.frame_counts(step_batches)
        for i, batch in enumerate(step_batches, 1):
            is_last = i == count
            with (
                contextlib.nullcontext() if is_last else no_sync(self.distiller),
                explain_out_of_memory(step, batch, self.device, self.hint),
            ):
                with self.autocast:
                    data = distiller_batch(batch, self.device)
                    detail = step % run.log_step == 0 or step == run.total_steps
                    loss, logs = self.distiller(data, step=step, detail=detail, counts=counts)
                self.optimizer_step.backward(scale * loss, batch)
            if batch.names:
                value = loss.detach()
                if "sparsity/term" in logs:  # may be negative and hide the distance to the teachers
                    value = value - logs["sparsity/term"]
                self._step_records["loss_mean"].append(value)
            for name, value in logs.items():
                self._step_records[name].append(value)  # tensors, which need no synchronisation
        with explain_out_of_memory(step, batch, self.device, self.hint):
            self.optimizer_step.clip()
            self._weights_unchanged = False
            return self.optimizer_step.update()

    def frame_counts(self, step_batches: Sequence[Batch]) -> tuple[FrameCounts, float]:
        """Denominators of the loss for the batches of a step, and the scale of each batch's loss.

        With ``loss.reduce: frames``, the mean of a term over the batches that have an utterance is
        its sum over the step, divided by the step's number of frames. The optimizer's step takes
        the mean over all batches, also those with only bad audio, which the scale makes up for.
        """
        total = FrameCounts()
        for batch in step_batches:
            own = self.upstream.count(batch)
            assert own is not None
            total = total.plus(own)
        used, *sums = self.processes.sum(sum(bool(b.names) for b in step_batches), *total)
        used = max(used, 1.0)
        scale = len(step_batches) * self.processes.world_size / used
        return FrameCounts(*sums).divided_by(used), scale

    def record_step(self, unread: UnreadStep) -> None:
        """Advance the progress by one step."""
        progress = self.progress
        progress.step += 1
        progress.epoch, progress.batch = self._epoch, self._batch
        self._unread.append((progress.step, unread, self._step_records))

    def read_steps(self, processes: ProcessGroup | None = None) -> list[StepResult]:
        """Wait for the device and read the steps since the last reading.

        Adds the scalars of those that were applied to the progress, logs and counts the others.
        ``processes``: those to exchange names with, by default all.

        Raises NotFiniteError if ``max_nonfinite`` steps in a row were skipped.
        """
        unread, self._unread = self._unread, []
        results = read_steps([values for _, values, _ in unread]) if unread else []
        for (step, _, records), result in zip(unread, results, strict=True):
            if result.applied:
                self.progress.skipped_in_a_row = 0
                for name, values in records.items():
                    self.progress.records[name] += values
            else:
                self.count_skipped(step, result, processes or self.processes)
        return results

    def count_skipped(self, step: int, result: StepResult, processes: ProcessGroup) -> None:
        """Log and count a step that was skipped; see :meth:`read_steps`."""
        progress = self.progress
        names = [name for names in processes.all_gather(result.names) for name in names]
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        level = logging.INFO if result.lowers_scale else logging.WARNING
        logger.log(
            level if self.processes.is_main else logging.DEBUG,
            "step %d skipped (%d in a row): loss %g, gradient norm %g, utterances: %s",
            step,
            progress.skipped_in_a_row,
            result.loss,
            result.norm,
            "float16 lowers its loss scale" if result.lowers_scale else ", ".join(names[:8]),
        )
        if progress.skipped_in_a_row >= self.settings.max_nonfinite:
            raise not_finite_error(step, progress.skipped_in_a_row, names, self.hint)

    def snapshot(self) -> None:
        """Save in memory what a step changes before it is complete: random states, position in the
        data, number of batches in the target statistics."""
        self._epoch, self._batch = self.progress.epoch, self.progress.batch
        self._random = random_states(self.device)
        self._target_norm_batches = self.upstream.target_norm_batches
        self.bad_audio.commit()
        self._weights_unchanged = True  # since the last completed step; the optimizer's state too

    # Log

    def log(self, result: StepResult) -> None:
        """Write this step, and means since the last point, to TensorBoard under s3prl's tags."""
        progress, prefix = self.progress, f"{self.args.upstream}/train-"
        (loss,) = self.processes.sum(result.loss)
        self.gather_records()
        scalars = {
            "loss": loss / self.processes.world_size,
            "lr": self.optimizer_step.learning_rate(),
            "gradient-norm": result.norm,
        }
        if progress.skipped:
            scalars["skipped"] = progress.skipped
        for name, value in scalars.items():
            self.logger.add_scalar(prefix + name, value, progress.step)
        self.upstream.log_records(progress.records, self.logger, prefix, progress.step)
        progress.records = defaultdict(list)

    def sparsity_text(self) -> str:
        """The expected and the target sparsity of this step, for the progress bar."""
        if "sparsity/expected" not in self._step_records:
            return ""
        expected, target = (
            float(self._step_records[f"sparsity/{name}"][-1]) for name in ("expected", "target")
        )
        return f"sparsity {expected:.3f}, target {target:.3f}"

    def draw_widths(self) -> None:
        """Write a picture of the expected widths of a student that is being pruned."""
        sparsity = self.upstream.distiller.sparsity
        if sparsity is None or not self.processes.is_main or find_spec("matplotlib") is None:
            return
        from ..system.figures import png
        from .widths import draw_widths

        try:
            picture = png(draw_widths(*sparsity.widths()))
        except SetupError as error:  # matplotlib is damaged
            logger.warning("no picture of the widths: %s", error)
            return
        self.logger.add_picture(f"{self.args.upstream}/widths", picture, self.progress.step)

    def gather_records(self) -> None:
        """Average the scalars since the last TensorBoard point over all processes."""
        if self.processes.world_size == 1:
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
        """Compute the dev loss; save ``dev-best.ckpt`` if it is the lowest so far.

        After a signal, stop and leave ``progress.dev_due`` true: the resumed run measures it.
        """
        progress = self.progress
        try:
            with self.autocast:
                batches = self.dev_batches()
                sums = dev_loss(self.upstream, batches, progress.step, self.device, self.hint)
        except StoppedDevLoss:
            return
        self.bad_audio.commit()
        total, samples = self.processes.sum(*sums)
        if not samples:
            raise self.bad_audio.no_usable_audio("dev_sets")
        loss = total / samples
        self.logger.add_scalar(f"{self.args.upstream}/dev-loss", loss, global_step=progress.step)
        progress.dev_due = False  # before the best checkpoint is saved
        best = math.inf if progress.best_loss is None else progress.best_loss
        # While a student is being pruned, its loss rises: earlier steps would always be the best.
        sparsity = self.upstream.distiller.sparsity
        is_best = loss < best and (sparsity is None or sparsity.is_reached())
        if self.processes.is_main:
            suffix = ", the best" if is_best else ""
            if sparsity is not None and not sparsity.is_reached():
                reached, target = float(sparsity.expected()), sparsity.pruning.sparsity
                suffix = f", at a sparsity of {reached:.3f}; the best is from {target:.3f} on"
            tqdm.write(f"[Runner] - dev loss {loss:.5f} at step {progress.step}{suffix}")
        if is_best:
            progress.best_loss, progress.best_step = loss, progress.step
            checkpoint = self.checkpoint()
            if self.processes.is_main:
                self.checkpoints.save(checkpoint, BEST_NAME)

    def dev_batches(self) -> Iterator[Batch]:
        """Yield the dev batches that have a usable utterance, with a progress bar.

        Raises StoppedDevLoss in all processes once a signal has arrived in one.
        """
        loader, count = self.upstream.dev_dataloader, self.processes.world_size
        assert loader is not None
        every = 1 if count == 1 else AGREE_EVERY
        batches = self.stop_signals.batches(loader)
        with tqdm(total=len(loader), dynamic_ncols=True, desc="dev", leave=False) as bar:
            # as many turns in each process, although some have a batch less
            for turn in range(math.ceil(loader.sampler.count / count)):
                stop = self.stop_signals.received is not None
                if turn % every == 0 and self.processes.any(stop):
                    raise StoppedDevLoss
                if (read := next(batches, None)) is None:
                    continue
                bar.update()
                batch = self.bad_audio.usable(read, self.progress.epoch)
                if batch.names:
                    yield batch

    # Save

    def save_or_stop(self) -> None:
        """Save a checkpoint if one is due; save and exit after a signal."""
        run, step = self.settings, self.progress.step
        minutes = (time.monotonic() - self._saved_at) / 60
        signal = self.stop_signals.received
        signal_name = self.processes.first_not_none(signal and signal.name)
        is_last = step == run.total_steps and not self.progress.dev_due
        stopping = signal_name is not None and not is_last
        numbered = self.is_due(run.save_step)
        if numbered or stopping or self.processes.any(0 < run.autosave_minutes <= minutes):
            checkpoint = self.checkpoint()
            if self.processes.is_main and numbered:
                path = self.checkpoints.save_numbered(checkpoint, step)
                tqdm.write(f"[Runner] - Save the checkpoint to: {path}")
            elif self.processes.is_main:
                self.checkpoints.save(checkpoint, LAST_CHECKPOINT)
            self._saved_step, self._saved_at = step, time.monotonic()
        if stopping or is_last:
            # torchrun kills the remaining processes half a minute after the first one exits.
            self.processes.barrier()
        if stopping:
            self.exit(signal_name)

    def exit(self, signal_name: str, saved: bool = True) -> NoReturn:
        """Print which step is saved, and exit with the exit code of a signal."""
        if self.processes.is_main:
            saved_step = self.progress.step if saved else self._saved_step
            tqdm.write(
                f"stopped by {signal_name} at step {self.progress.step} of "
                f"{self.settings.total_steps}, saved at step {saved_step}; {self.hint}",
                file=sys.stderr,
            )
        raise SystemExit(exit_code(signal_name))

    def checkpoint(self, alone: bool = False) -> dict[str, Any]:
        """The contents of a checkpoint: s3prl's keys, the upstream's, and the trainer's state.

        With ``alone`` there is no communication with the other processes, which may have ended.
        """
        self.logger.flush()  # so that a killed run has all points from before its checkpoint
        processes = ProcessGroup() if alone else self.processes
        self.read_steps(processes)
        if not alone:
            self.gather_records()
        self.progress.scaler = self.optimizer_step.scaler.state_dict()
        bad_audio = self.bad_audio.merge(processes.all_gather(self.bad_audio.state()))
        states = {
            "Optimizer": self.optimizer_step.optimizer.state_dict(),
            "Step": self.progress.step - 1,  # as in s3prl; add_state_to_save adds 1
            "Args": self.args,
            "Config": self.config,
            RUN_STATE_KEY: {
                **self.progress.state_dict(processes.all_gather(self._random)),
                "bad_audio": as_tensor(bad_audio),
            },
        }
        if self.optimizer_step.scheduler is not None:
            states["Scheduler"] = self.optimizer_step.scheduler.state_dict()
        return self.upstream.add_state_to_save(states)

    # Save on errors

    @contextlib.contextmanager
    def save_on_error(self) -> Iterator[None]:
        """If an error ends the loop, save the last completed step; flush the logs in any case."""
        try:
            yield
        except (SaveError, NotFiniteError):
            raise
        except StoppedWaiting:
            # wait=0, because the main process is waiting too, perhaps for this one.
            assert self.stop_signals.received is not None
            self.exit(self.stop_signals.received.name, self.save_last_step(wait=0))
        except Exception as error:
            overdue = self.stop_signals.is_batch_overdue()
            saved = self.save_last_step()
            if self.processes.world_size > 1 and is_lost_process(error):
                if overdue and self.stop_signals.received is not None:
                    self.exit(self.stop_signals.received.name, saved)
                raise SetupError(
                    f"another process of this run ended after step {self.progress.step}; see its "
                    f"error message; {self.hint}"
                ) from None
            raise
        finally:
            self.logger.flush()
            if self.processes.is_main:
                self.bad_audio.write()

    def save_last_step(self, wait: float = 3) -> bool:
        """Save the last completed step, unless weights or target statistics have changed since.

        If rank 0 is lost, rank 1 saves it, after ``wait`` seconds. Returns whether it is saved.
        """
        step = self.progress.step
        if self._saved_step == step:
            return True
        if not self._weights_unchanged or self.processes.rank > 1:
            return False
        try:
            if self.upstream.target_norm_batches != self._target_norm_batches:
                return False
            if self.processes.world_size > 1:
                end = time.monotonic() + (0 if self.processes.is_main else wait)
                while not (saved := self.is_saved_by_other_rank()) and time.monotonic() < end:
                    time.sleep(1)
                if saved:
                    return True
            path = self.checkpoints.save(self.checkpoint(alone=True), LAST_CHECKPOINT)
            logger.warning("saved step %d: %s", step, path)
        except Exception as error:  # only logged: the caller raises the first error
            logger.warning("cannot save step %d: %s", step, error)
            return False
        return True

    def is_saved_by_other_rank(self) -> bool:
        path = self.checkpoints.folder / LAST_CHECKPOINT
        try:
            return path.exists() and read_checkpoint(path)["Step"] >= self.progress.step
        except CheckpointError:  # damaged
            return False


def new_progress(upstream: UpstreamPretrainExpert) -> Progress:
    """The progress of a new run, with digests of its length tables, teachers and units."""
    data = upstream.data
    return Progress(
        batches=len(upstream.dataloader.sampler),
        tables=table_digests(data.file_path, data.sets),
        sources=source_digests(upstream.settings),
        dev_tables=table_digests(data.file_path, data.dev_sets),
    )


@torch.no_grad()
def dev_loss(
    upstream: UpstreamPretrainExpert,
    batches: Iterable[Batch],
    step: int,
    device: str,
    hint: str = "",
) -> tuple[float, float]:
    """Sum the loss over the dev batches, each weighted by its number of samples.

    There is no dropout, and excerpts and distortions are the same at every call. The random states
    and running statistics of training do not change. ``upstream`` is in train mode afterwards;
    teacher weights may depend on ``step``. Returns the sum, and the sum of the weights. ``hint``
    ends the message if there is too little memory.
    """
    total = samples = 0.0
    upstream.eval()
    try:
        with preserve_random_states(device):
            for batch in batches:
                with explain_out_of_memory(step, batch, device, hint):
                    loss, _ = upstream.distiller(distiller_batch(batch, device), step=step)
                weight = float(batch.lengths.sum())
                total += loss.item() * weight
                samples += weight
    finally:
        upstream.train()
    return total, samples


def resume_command(args: argparse.Namespace, processes: int = 1) -> str:
    """The command that resumes a run, from its arguments and number of processes."""
    name, folder = str(args.expname), str(args.expdir)
    default = f"{PretrainRequest.ROOT}/{name}"
    option = ["-n", name] if folder == default else ["-p", folder]
    argv = ["run_pretrain.py", "-u", args.upstream, *option, "-a"]
    return shlex.join(torchrun.torchrun_command(argv, processes))


def write_configs(args: argparse.Namespace, model: ModelFile, runner: dict[str, Any]) -> None:
    """Write the run's settings into its folder, as files for ``-c`` and ``-g``.

    They have all defaults, what ``extends`` and ``-o`` changed, and the precisions that ``auto``
    chose.
    """
    folder = Path(args.expdir)
    paths = {"c": folder / "config_runner.yaml", "g": folder / "config_model.yaml"}
    files = " ".join(f"-{option} {shlex.quote(str(path))}" for option, path in paths.items())
    seed = "" if args.seed == DEFAULT_SEED else f" --seed {args.seed}"
    command = printable(f"run_pretrain.py -u ekd {files}{seed} -n NAME")
    head = f"# The settings of this run; an equal one:\n# {command}\n"
    checked = check_runner_config(runner, str(paths["c"]))
    with explain_write_errors(folder):
        for path, settings in zip(paths.values(), (checked, model), strict=True):
            write_text(path, head + yaml.safe_dump(to_plain_data(settings), sort_keys=False))
