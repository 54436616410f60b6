"""The loop of one stage: batches, steps, dev points, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from s3prl_ekd.data.batches import ignore_stop_signals
from s3prl_ekd.data.loader import BatchLoader
from s3prl_ekd.pretrain.optim import fused_adamw, warmup_schedule
from s3prl_ekd.system.lock import FolderLock

from . import checkpoint
from .checkpoint import StageProgress, TrainingState
from .corpus import Corpus, hours
from .curves import write_log
from .dataset import ExcerptDataset
from .dev import DevEvaluation
from .labels import UnitLabels
from .models import MaskedPredictor
from .plan import EndlessBatchSampler
from .recipe import STAGES, Recipe, TrainingStage, stage_steps
from .step import add, averages, seed_everything, step

_COLLAPSED = 0.01  # spread of the last layer; a sound run has 0.3 and more
StopFn = Callable[[int], bool]


@dataclass(frozen=True)
class TrainingOptions:
    """What has no say in the weights: how often is logged, checked and saved; where it runs."""

    device: str = "cpu"
    workers: int = 0
    log_every: int = 50
    dev_every: int = 500
    save_seconds: float = 120.0


def train(
    stage: TrainingStage,
    recipe: Recipe,
    corpus: Corpus,
    labels: UnitLabels,
    zoo: Path,
    options: TrainingOptions,
    stop: StopFn = lambda step: False,
    at_start: Callable[[MaskedPredictor], None] = lambda model: None,
) -> MaskedPredictor | None:
    """Train a stage, from where its checkpoint stands.

    Args:
        stage, recipe: what and how.
        corpus, labels: of what.
        zoo: the folder whose ``STAGE/`` gets checkpoint, log and curves.
        pace: how often, where.
        stop: asked after each step, with its number; True saves and leaves.
        at_start: called with the untrained model of a new run, before it gets the weights of
            the stage it starts from.

    Returns:
        The model after its last step, in eval mode; None where ``stop`` came first.

    Raises:
        CheckpointError: the stage's checkpoint, or that of the stage it starts from, is not usable.
        DataError: an audio file cannot be read, or the loss is no number any more.
        SetupError: another process trains this stage, or the folder cannot be written to.
    """
    folder = zoo / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(folder):
        last = folder / "checkpoint.pt"
        steps = stage_steps(recipe, stage)
        seed_everything(recipe.seed)
        model = MaskedPredictor(stage.family, recipe, labels.classes)
        if not last.exists():
            at_start(model)
            if stage.start:
                same_units = STAGES[stage.start].units == stage.units
                source = zoo / stage.start / "checkpoint.pt"
                checkpoint.load_model(source, stage.start, model, with_head=same_units)
        state = _parts(model, stage, recipe, steps, options.device)
        progress = checkpoint.load(last, stage.name, state) if last.exists() else StageProgress()
        if progress.step < steps:
            run = _TrainingLoop(stage, recipe, corpus, labels, zoo, options, steps, state, progress)
            if not run(stop):
                return None
        return model.eval()


def _parts(
    model: MaskedPredictor, stage: TrainingStage, recipe: Recipe, steps: int, device: str
) -> TrainingState:
    model.to(device).train()
    config = {
        "lr": recipe.lr * stage.lr,
        "betas": (0.9, 0.98),
        "weight_decay": recipe.weight_decay,
        "warmup_proportion": recipe.warmup,
    }
    optimizer = fused_adamw(model, config)
    return TrainingState(model, optimizer, warmup_schedule(optimizer, config, steps), device)


class _TrainingLoop:
    """The steps from ``progress`` on, of one process."""

    def __init__(
        self,
        stage: TrainingStage,
        recipe: Recipe,
        corpus: Corpus,
        labels: UnitLabels,
        zoo: Path,
        options: TrainingOptions,
        steps: int,
        state: TrainingState,
        progress: StageProgress,
    ):
        self.stage, self.recipe, self.options, self.steps = stage, recipe, options, steps
        self.state, self.progress = state, progress
        self.folder, noise = zoo / stage.name, zoo / "noise"
        floor_loss, floor_accuracy = labels.baseline()
        self.about = {
            "stage": stage.name,
            "steps": steps,
            "units": labels.classes,
            "floor_loss": floor_loss,
            "floor_accuracy": floor_accuracy,
            "train_hours": hours(corpus.train),
            "device": options.device,
        }
        self.dev = {"dev_": DevEvaluation(corpus, labels, stage.input_kind, recipe, noise)}
        if stage.input_kind != "clean":
            self.dev["dev_clean_"] = DevEvaluation(corpus, labels, "clean", recipe, noise)
        place = (progress.epoch, progress.position)
        self.loader = BatchLoader(
            ExcerptDataset(corpus.train, labels, 0, stage.input_kind, recipe, noise),
            sampler=EndlessBatchSampler(
                corpus.train, recipe.batch_seconds, recipe.crop_seconds, recipe.seed, *place
            ),
            batch_size=None,
            num_workers=options.workers,
            pin_memory=options.device.startswith("cuda"),
            generator=torch.Generator(),  # or the loader would draw from the run's
            worker_init_fn=leave_signals_to_the_main_process,
            prefetch_factor=4 if options.workers else None,
        )

    def __call__(self, stop: StopFn) -> bool:
        """Whether the last step was taken."""
        progress, device = self.progress, self.state.device
        began = saved = since = time.monotonic()
        spent, heard = progress.spent, 0.0  # of earlier processes; since the last point
        bar = tqdm(
            desc=self.stage.name,
            total=self.steps,
            initial=progress.step,
            unit=" steps",
            dynamic_ncols=True,
        )
        with bar:
            for batch, waves, labels in self.loader:
                waves = waves.to(device, non_blocking=True)
                outcome = step(self.state, self.recipe, waves, labels.to(device, non_blocking=True))
                progress.step += 1
                progress.epoch, progress.position = batch.epoch, batch.position + 1
                progress.heard += batch.seconds
                heard += batch.seconds
                add(progress.window, outcome)
                bar.update()
                final = progress.step == self.steps
                if progress.step % self.options.log_every == 0 or final:
                    self._point(bar, heard / (time.monotonic() - since), final)
                    heard, since = 0.0, time.monotonic()
                progress.spent = spent + time.monotonic() - began
                leave = final or stop(progress.step)
                if leave or time.monotonic() - saved > self.options.save_seconds:
                    self._save()
                    saved = time.monotonic()
                if leave:
                    break
        return progress.step == self.steps

    def _point(self, bar: tqdm, speed: float, final: bool) -> None:
        progress = self.progress
        point = {
            "step": progress.step,
            "epoch": progress.epoch,
            **averages(progress.window),
            "lr": self.state.schedule.get_last_lr()[0],
            "audio_seconds_per_second": speed,
        }
        progress.window.clear()
        if progress.step % self.options.dev_every == 0 or final:
            for prefix, dev in self.dev.items():
                found = dev(self.state)
                point.update({prefix + name: value for name, value in found.items()})
        if point["spread"] < _COLLAPSED:
            tqdm.write(
                f"{self.stage.name}, step {progress.step}: all frames look alike to the model (it "
                "has collapsed); begin again with a smaller --lr"
            )
        progress.log.append(point)
        bar.set_postfix_str(
            f"loss {point['masked_loss']:.3f}, right {point['accuracy']:.1%}, "
            f"{speed:.0f} s of audio a second"
        )

    def _save(self) -> None:
        progress = self.progress
        checkpoint.save(self.folder / "checkpoint.pt", self.stage.name, self.state, progress)
        done = {"hours_heard": progress.heard / 3600, "hours_spent": progress.spent / 3600}
        write_log(progress.log, {**self.about, **done}, self.folder)
