"""Loss and accuracy on held-out utterances."""

from __future__ import annotations

from pathlib import Path

import torch

from s3prl_ekd.system.random_states import preserve_random_states

from .checkpoint import TrainingState
from .corpus import Corpus
from .dataset import batch_sizes, make_dataset
from .labels import FrameLabels
from .plan import epoch_batches
from .recipe import InputKind, TeacherRecipe
from .step import add, averages, forward, seed_everything

_EPOCH = -1  # epoch number of the random draws for dev; training starts at 0
_SECONDS = 300.0  # of dev audio that are used


class DevEvaluation:
    """Evaluation on dev, with the same excerpts, distortions and masks at each call.

    Args:
        corpus: of which ``dev`` is used.
        labels: labels of the whole corpus; None for pairs of excerpts.
        input_kind: clean, distorted or mixed.
        recipe: recipe of the training.
        noise: the folder of noise clips.
    """

    def __init__(
        self,
        corpus: Corpus,
        labels: FrameLabels | None,
        input_kind: InputKind,
        recipe: TeacherRecipe,
        noise: Path,
    ):
        self.recipe = recipe
        self.excerpts = make_dataset(
            corpus.dev, labels, len(corpus.train), input_kind, recipe, noise
        )
        self.batches, total = [], 0.0
        sizes = batch_sizes(recipe, labels is None)
        for batch in epoch_batches(corpus.dev, *sizes, recipe.seed, _EPOCH):
            if total < _SECONDS:
                self.batches.append(batch)
                total += batch.seconds

    @torch.no_grad()
    def __call__(self, state: TrainingState) -> dict[str, float]:
        """Compute ``prediction_loss``, ``accuracy`` of masked frames, ``penalty`` and ``spread``.

        Dropout is off; random states are restored, and the model is in train mode afterwards.
        """
        window: dict[str, float] = {}
        state.model.eval()
        with preserve_random_states(state.device):
            seed_everything(self.recipe.seed)
            for batch in self.batches:
                _, waves, labels = self.excerpts[batch]
                waves, labels = waves.to(state.device), labels.to(state.device)
                add(window, forward(state, self.recipe, waves, labels))
        state.model.train()
        return averages(window)
