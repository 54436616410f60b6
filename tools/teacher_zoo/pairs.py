"""Training without units: which two excerpts are of one utterance? (the speaker teacher, ours)

Two excerpts of an utterance share the speaker. Each is distorted anew, so that noise, room and
level do not tell which belong together. The loss is that of SimCLR (arXiv 2002.05709, equation 1):
cross entropy over the cosine similarities of an excerpt with all others of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import Dataset

from s3prl_ekd.data.audio import Recording
from s3prl_ekd.data.sampling import generator

from .corpus import CorpusUtterance
from .criterion import StepLoss, spread
from .frames import HOP, sample_count
from .noises import make_distorter
from .plan import PlannedBatch
from .recipe import TeacherRecipe

TEMPERATURE = 0.1  # of the cosine similarities
_GAIN_DB = 6.0  # an excerpt's level changes by at most this


def pair_baseline(recipe: TeacherRecipe) -> tuple[float, float]:
    """Loss (nats) and accuracy of a guess: an excerpt's partner is one of all others."""
    others = 2 * recipe.pair_utterances - 1
    return math.log(others), 1 / others


class PairDataset(Dataset):
    """``dataset[batch]`` is ``(batch, waves [2 * utterance, sample], partners [2 * utterance])``.

    Rows ``i`` and ``utterances + i`` are two excerpts of one utterance; ``partners`` has the index
    of the other one.

    Args:
        utterances: utterances of one split; batches have indices into it.
        recipe: settings of the distortion.
        noise: the folder of noise clips.
    """

    def __init__(self, utterances: Sequence[CorpusUtterance], recipe: TeacherRecipe, noise: Path):
        self.utterances, self.recipe = utterances, recipe
        self.distorter = make_distorter(noise, recipe)

    def __getitem__(self, batch: PlannedBatch) -> tuple[PlannedBatch, Tensor, Tensor]:
        count = len(batch.excerpts)
        waves = [
            self._excerpt(index, batch, view) for view in (0, 1) for index, _ in batch.excerpts
        ]
        partners = torch.arange(2 * count).roll(count)
        return batch, torch.stack(waves), partners

    def _excerpt(self, index: int, batch: PlannedBatch, view: int) -> Tensor:
        utterance, samples = self.utterances[index], sample_count(batch.frames)
        draws = generator(self.recipe.seed, batch.epoch, utterance.key, f"excerpt {view}")
        first = HOP * draws.randint(0, (utterance.length - samples) // HOP)
        with Recording(utterance.path) as recording:
            wave = recording.read(first, samples)
        plan = self.distorter.plan(utterance.key, batch.epoch, ("student", "teacher")[view])
        gain = 10 ** (draws.uniform(-_GAIN_DB, _GAIN_DB) / 20)
        return gain * self.distorter.render(wave, plan)


def pair_criterion(
    hidden: Tensor, embeddings: Tensor, partners: Tensor, conv_power: Tensor, penalty: float
) -> StepLoss:
    """The loss of SimCLR, plus ``penalty`` times the mean square of the conv features.

    Args:
        hidden: last hidden states, ``[excerpt, frame, width]``, for the log.
        embeddings: ``[excerpt, width]``.
        partners: ``[excerpt]``, index of the other excerpt of the same utterance.
        conv_power: mean square of the conv features.
        penalty: its weight.
    """
    unit = normalize(embeddings.float(), dim=-1)
    scores = (unit @ unit.T / TEMPERATURE).fill_diagonal_(-math.inf)
    loss = cross_entropy(scores, partners)
    accuracy = (scores.detach().argmax(1) == partners).float().mean()
    return StepLoss(
        loss + penalty * conv_power,
        loss.detach(),
        accuracy,
        len(partners),
        conv_power.detach(),
        spread(hidden),
    )
