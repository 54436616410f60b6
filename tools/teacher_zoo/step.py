"""An optimizer step, and averages for the log."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from s3prl_ekd.errors import DataError

from .checkpoint import TrainingState
from .criterion import StepLoss, criterion
from .pairs import pair_criterion
from .recipe import TeacherRecipe

# Values that are averaged, weighted by the number of predictions
WINDOW = ("prediction_loss", "accuracy", "penalty", "spread")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy (masks and dropped layers) and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def forward(state: TrainingState, recipe: TeacherRecipe, waves: Tensor, labels: Tensor) -> StepLoss:
    """Compute the criterion on a batch; the model runs in bfloat16 on CUDA, else in float32.

    Args:
        state, recipe: model and settings.
        waves: ``[excerpt, sample]``.
        labels: units, ``[excerpt, frame]``; or, for pairs, the index of the partner, ``[excerpt]``.
    """
    on_cuda, pairs = state.device.startswith("cuda"), labels.dim() == 1
    with torch.autocast("cuda", torch.bfloat16, enabled=on_cuda):
        encoded = state.model(waves, mask=not pairs)
        embeddings = state.model.embeddings(encoded.hidden) if pairs else None
    if embeddings is not None:
        return pair_criterion(encoded.hidden, embeddings, labels, encoded.penalty, recipe.penalty)
    return criterion(encoded, labels, state.model.logits, recipe.alpha, recipe.penalty)


def step(state: TrainingState, recipe: TeacherRecipe, waves: Tensor, labels: Tensor) -> StepLoss:
    """Take an optimizer step: forward, backward, clipping, update.

    Raises:
        DataError: the gradient is not finite.
    """
    outcome = forward(state, recipe, waves, labels)
    state.optimizer.zero_grad(set_to_none=True)
    outcome.loss.backward()
    norm = clip_grad_norm_(state.model.parameters(), recipe.clip)
    if not norm.isfinite():
        raise DataError(
            f"the gradient is not finite (loss {float(outcome.loss.detach()):g}); delete the "
            "stage's folder and train again with a smaller --lr"
        )
    state.optimizer.step()
    state.schedule.step()
    return outcome


def add(window: dict[str, float], outcome: StepLoss) -> None:
    """Add a step to the sums in ``window``; it starts as an empty dict."""
    for name in WINDOW:
        window[name] = window.get(name, 0.0) + float(getattr(outcome, name)) * outcome.predictions
    window["predictions"] = window.get("predictions", 0) + outcome.predictions


def averages(window: dict[str, float]) -> dict[str, float]:
    """Means from the sums in ``window``."""
    return {name: window[name] / window["predictions"] for name in WINDOW}
