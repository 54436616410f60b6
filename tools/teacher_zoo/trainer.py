"""The training loop of a stage: batches, steps, dev evaluation, checkpoints."""

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
from s3prl_ekd.teachers import zoo as zoo_files

from . import checkpoint
from .checkpoint import StageProgress, TrainingState
from .corpus import Corpus, hours
from .curves import write_log
from .dataset import batch_sizes, make_dataset
from .dev import DevEvaluation
from .labels import FrameLabels
from .models import MaskedPredictor
from .pairs import pair_baseline
from .plan import EndlessBatchSampler
from .recipe import STAGES, TeacherRecipe, TrainingStage, stage_steps
from .step import add, averages, seed_everything, step

_COLLAPSED = 0.01  # spread of the last layer; normal runs have 0.3 or more
StopFn = Callable[[int], bool]


@dataclass(frozen=True)
class TrainingOptions:
    """Settings that do not influence the weights: device, loader workers, intervals."""

    device: str = "cpu"
    workers: int = 0
    log_every: int = 50
    dev_every: int = 500
    save_seconds: float = 120.0


def train(
    stage: TrainingStage,
    recipe: TeacherRecipe,
    corpus: Corpus,
    labels: FrameLabels | None,
    zoo: Path,
    options: TrainingOptions,
    stop: StopFn = lambda step: False,
    at_start: Callable[[MaskedPredictor], None] = lambda model: None,
) -> MaskedPredictor | None:
    """Train a stage, or resume from its checkpoint.

    Args:
        stage, recipe: settings of the stage and of all stages.
        corpus, labels: training data and its unit labels; None for a stage without units.
        zoo: checkpoint, log and curves are written to ``zoo/STAGE/``.
        options: device, workers, intervals.
        stop: called with the step number after each step; if True, training saves and stops.
        at_start: called with the randomly initialised model of a new run, before the weights of
            ``stage.start`` are loaded.

    Returns:
        The model after the last step, in eval mode; None if stopped before.

    Raises:
        CheckpointError: the checkpoint of the stage, or of ``stage.start``, cannot be loaded.
        DataError: an audio file cannot be read, or the gradient is not finite.
        SetupError: another process trains this stage, or cannot write to the folder.
    """
    folder = zoo / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(folder):
        last = folder / "checkpoint.pt"
        steps = stage_steps(recipe, stage)
        seed_everything(recipe.seed)
        model = MaskedPredictor(stage.family, recipe, labels.classes if labels else 1)
        if not last.exists():
            at_start(model)
            if stage.start in zoo_files.TEACHERS:
                checkpoint.load_shipped(stage.start, model)
            elif stage.start:
                same_units = STAGES[stage.start].units == stage.units
                source = zoo / stage.start / "checkpoint.pt"
                checkpoint.load_model(source, stage.start, model, with_head=same_units)
        state = _make_state(model, stage, recipe, steps, options.device)
        progress = checkpoint.load(last, stage.name, state) if last.exists() else StageProgress()
        if progress.step < steps:
            run = _TrainingLoop(stage, recipe, corpus, labels, zoo, options, steps, state, progress)
            if not run(stop):
                return None
        return model.eval()


def _make_state(
    model: MaskedPredictor, stage: TrainingStage, recipe: TeacherRecipe, steps: int, device: str
) -> TrainingState:
    model.to(device).train()
    model.backbone.feature_extractor.requires_grad_(stage.train_extractor)
    config = {
        "lr": recipe.lr * stage.lr,
        "betas": (0.9, 0.98),
        "weight_decay": recipe.weight_decay,
        "warmup_proportion": recipe.warmup,
    }
    optimizer = fused_adamw(model, config)
    return TrainingState(model, optimizer, warmup_schedule(optimizer, config, steps), device)


class _TrainingLoop:
    """The steps of one process, from ``progress`` on."""

    def __init__(
        self,
        stage: TrainingStage,
        recipe: TeacherRecipe,
        corpus: Corpus,
        labels: FrameLabels | None,
        zoo: Path,
        options: TrainingOptions,
        steps: int,
        state: TrainingState,
        progress: StageProgress,
    ):
        self.stage, self.recipe, self.options, self.steps = stage, recipe, options, steps
        self.state, self.progress = state, progress
        self.folder, noise = zoo / stage.name, zoo / "noise"
        floor_loss, floor_accuracy = labels.baseline() if labels else pair_baseline(recipe)
        self.about = {
            "stage": stage.name,
            "steps": steps,
            "units": labels.classes if labels else 0,
            "floor_loss": floor_loss,
            "floor_accuracy": floor_accuracy,
            "train_hours": hours(corpus.train),
            "device": options.device,
        }
        self.dev = {"dev_": DevEvaluation(corpus, labels, stage.input_kind, recipe, noise)}
        if labels is not None and stage.input_kind != "clean":
            self.dev["dev_clean_"] = DevEvaluation(corpus, labels, "clean", recipe, noise)
        next_batch = (progress.epoch, progress.position)
        self.loader = BatchLoader(
            make_dataset(corpus.train, labels, 0, stage.input_kind, recipe, noise),
            sampler=EndlessBatchSampler(
                corpus.train, *batch_sizes(recipe, labels is None), recipe.seed, *next_batch
            ),
            batch_size=None,
            num_workers=options.workers,
            pin_memory=options.device.startswith("cuda"),
            generator=torch.Generator(),  # else the loader draws from the global generator
            worker_init_fn=ignore_stop_signals,
            prefetch_factor=4 if options.workers else None,
        )

    def __call__(self, stop: StopFn) -> bool:
        """Train until the last step or ``stop``; return whether the last step was taken."""
        progress, device = self.progress, self.state.device
        started = saved = logged = time.monotonic()
        earlier_seconds = progress.spent  # training time of earlier processes
        audio = 0.0  # seconds of audio since the last point of the log
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
                audio += batch.seconds
                add(progress.window, outcome)
                bar.update()
                final = progress.step == self.steps
                if progress.step % self.options.log_every == 0 or final:
                    self._log_point(bar, audio / (time.monotonic() - logged), final)
                    audio, logged = 0.0, time.monotonic()
                progress.spent = earlier_seconds + time.monotonic() - started
                leave = final or stop(progress.step)
                if leave or time.monotonic() - saved > self.options.save_seconds:
                    self._save()
                    saved = time.monotonic()
                if leave:
                    break
        return progress.step == self.steps

    def _log_point(self, bar: tqdm, speed: float, final: bool) -> None:
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
                values = dev(self.state)
                point.update({prefix + name: value for name, value in values.items()})
        if point["spread"] < _COLLAPSED:
            tqdm.write(
                f"{self.stage.name}, step {progress.step}: the model has collapsed (its output is "
                "nearly the same for all frames); train again with a smaller --lr"
            )
        progress.log.append(point)
        bar.set_postfix_str(
            f"loss {point['prediction_loss']:.3f}, accuracy {point['accuracy']:.1%}, "
            f"{speed:.0f} s of audio per second"
        )

    def _save(self) -> None:
        progress = self.progress
        checkpoint.save(self.folder / "checkpoint.pt", self.stage.name, self.state, progress)
        hours_so_far = {"hours_heard": progress.heard / 3600, "hours_spent": progress.spent / 3600}
        write_log(progress.log, {**self.about, **hours_so_far}, self.folder)
