"""Checkpoint of a stage: everything that the next step depends on, in one file."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.files.atomic import atomic_torch_save
from s3prl_ekd.files.formats import check_format_version
from s3prl_ekd.files.torch_load import safe_load
from s3prl_ekd.system.random_states import random_states, set_random_states
from s3prl_ekd.teachers import zoo

from .models import MaskedPredictor

FORMAT, VERSION = "s3prl_ekd.tiny_teacher_training", 1


@dataclass
class StageProgress:
    """Progress of a stage, as stored in its checkpoint.

    Attributes:
        epoch, position: of the next batch.
        heard: seconds of audio so far.
        spent: seconds of training time so far.
        window: sums since the last point of the log.
        log: the points of the log.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    heard: float = 0.0
    spent: float = 0.0
    window: dict[str, float] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingState:
    """Model, optimizer and schedule of a stage, and their device."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    device: str


def save(path: Path, stage: str, state: TrainingState, progress: StageProgress) -> None:
    """Write a checkpoint atomically, with random states.

    Raises:
        OSError: cannot write it; an older checkpoint is kept.
    """
    states = {
        "format": FORMAT,
        "version": VERSION,
        "stage": stage,
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "schedule": state.schedule.state_dict(),
        "random": random_states(state.device),
        "progress": vars(progress),
    }
    atomic_torch_save(states, path)


def load_model(
    path: Path, stage: str, model: MaskedPredictor, with_head: bool = True
) -> dict[str, Any]:
    """Load the weights of a checkpoint into ``model``, and return the checkpoint.

    Args:
        path: the checkpoint.
        stage: the stage it must belong to.
        model: the model to load into.
        with_head: False keeps the model's head, if its units are not those of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or of another stage or model size.
    """
    states = safe_load(path, "training checkpoint")
    if states.get("format") != FORMAT or states.get("stage") != stage:
        raise CheckpointError(f"{path} is not a checkpoint of stage {stage}; delete it")
    check_format_version(states.get("version", 1), VERSION, f"the checkpoint {path}")
    try:
        weights = dict(states["model"])
        if not with_head:
            weights.update(model.head_weights())
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path} has a model of another size; delete it") from None
    return states


def load_shipped(name: str, model: MaskedPredictor) -> None:
    """Load the weights of a shipped HuBERT into ``model``, which keeps its own head.

    Raises:
        CheckpointError: the recipe has another size than the shipped teachers.
    """
    weights = safe_load(zoo.checkpoint_path(name), "shipped teacher")["model_weight"]
    own = {key.split(".", 1)[1] for key in model.head_weights()}
    weights = {key: value.float() for key, value in weights.items() if key not in own}
    try:
        missing, unknown = model.backbone.load_state_dict(weights, strict=False)
    except RuntimeError:
        missing, unknown = [name], []
    if unknown or not set(missing) <= own:
        raise CheckpointError(
            f"{name} has another size than the recipe; train with the default size"
        ) from None


def load(path: Path, stage: str, state: TrainingState) -> StageProgress:
    """Load a checkpoint into ``state`` and the random states; return its progress.

    Raises:
        CheckpointError: see :func:`load_model`.
    """
    states = load_model(path, stage, state.model)
    try:
        state.optimizer.load_state_dict(copy.deepcopy(states["optimizer"]))
        state.schedule.load_state_dict(states["schedule"])
        progress = StageProgress(**states["progress"])
        set_random_states(states["random"], state.device)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it") from None
    return progress
