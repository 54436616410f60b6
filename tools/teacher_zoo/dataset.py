"""Read the waveforms and labels of a planned batch.

Random draws depend only on seed, epoch and utterance, not on the number of loader workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from s3prl_ekd.data.audio import Recording, read_audio
from s3prl_ekd.data.audio_files import find_audio
from s3prl_ekd.data.sampling import generator

from .corpus import CorpusUtterance
from .frames import HOP, sample_count
from .labels import FrameLabels
from .mixing import mix_batch
from .noises import make_distorter
from .pairs import PairDataset
from .plan import PlannedBatch
from .recipe import InputKind, TeacherRecipe


def batch_sizes(recipe: TeacherRecipe, pairs: bool) -> tuple[float, float]:
    """Seconds of audio of a batch, and of its longest excerpt; of one excerpt of each pair."""
    if pairs:
        return recipe.pair_utterances * recipe.pair_seconds, recipe.pair_seconds
    return recipe.batch_seconds, recipe.crop_seconds


def make_dataset(
    utterances: Sequence[CorpusUtterance],
    labels: FrameLabels | None,
    offset: int,
    input_kind: InputKind,
    recipe: TeacherRecipe,
    noise: Path,
) -> Dataset:
    """An :class:`ExcerptDataset`, or, without labels, a :class:`pairs.PairDataset`."""
    if labels is None:
        return PairDataset(utterances, recipe, noise)
    return ExcerptDataset(utterances, labels, offset, input_kind, recipe, noise)


class ExcerptDataset(Dataset):
    """``dataset[batch]`` is ``(batch, waves [excerpt, sample], labels [excerpt, frame])``.

    Args:
        utterances: utterances of one split; batches have indices into it.
        labels: labels of the whole corpus.
        offset: index of the first utterance in ``labels``.
        input_kind: clean, distorted or mixed.
        recipe: settings of distortion and mixing.
        noise: the folder of noise clips.
    """

    def __init__(
        self,
        utterances: Sequence[CorpusUtterance],
        labels: FrameLabels,
        offset: int,
        input_kind: InputKind,
        recipe: TeacherRecipe,
        noise: Path,
    ):
        self.utterances, self.labels, self.offset = utterances, labels, offset
        self.input_kind, self.recipe = input_kind, recipe
        if input_kind == "distorted":
            self.distorter = make_distorter(noise, recipe)
        elif input_kind == "mixed":
            self.noises = [read_audio(noise / name) for name in find_audio(noise)]

    def __getitem__(self, batch: PlannedBatch) -> tuple[PlannedBatch, Tensor, Tensor]:
        waves, targets = [], []
        for index, first in batch.excerpts:
            with Recording(self.utterances[index].path) as recording:
                wave = recording.read(first * HOP, sample_count(batch.frames))
            if self.input_kind == "distorted":
                plan = self.distorter.plan(self.utterances[index].key, batch.epoch, "student")
                wave = self.distorter.render(wave, plan)
            waves.append(wave)
            labels = self.labels.of_utterance(self.offset + index)[first : first + batch.frames]
            targets.append(torch.from_numpy(labels.astype("int64")))
        stacked = torch.stack(waves)
        if self.input_kind == "mixed":
            r = self.recipe
            generators = [
                generator(r.seed, batch.epoch, self.utterances[i].key, "mix")
                for i, _ in batch.excerpts
            ]
            stacked = mix_batch(stacked, generators, self.noises, r.mix, r.mix_noise)
        return batch, stacked, torch.stack(targets)
