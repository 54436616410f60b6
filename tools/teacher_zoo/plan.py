"""Batches of excerpts, a function of seed and epoch.

The excerpts of a batch are equally long, as in HuBERT. There is no padding, which the extractor's
group norm (over the whole excerpt) would include.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from s3prl_ekd.data.audio_files import SAMPLE_RATE
from s3prl_ekd.data.sampling import bucket, generator
from s3prl_ekd.data.tables import Utterance as TableUtterance

from .corpus import CorpusUtterance
from .frames import HOP, frame_count, sample_count

_JITTER = 0.1  # lengths are perturbed by this before sorting, so that batches differ by epoch
_UNLIMITED = 2**31


@dataclass(frozen=True)
class PlannedBatch:
    """A batch of excerpts of ``frames`` frames each.

    Attributes:
        position: in the epoch, from 0.
        excerpts: (index of the utterance, first frame).
    """

    epoch: int
    position: int
    excerpts: tuple[tuple[int, int], ...]
    frames: int

    @property
    def seconds(self) -> float:
        """Total duration of the excerpts."""
        return len(self.excerpts) * sample_count(self.frames) / SAMPLE_RATE


def epoch_batches(
    utterances: Sequence[CorpusUtterance], seconds: float, crop: float, seed: int, epoch: int
) -> list[PlannedBatch]:
    """Plan the batches of an epoch, with each utterance once.

    Args:
        utterances: utterances of one split; the batches have indices into it.
        seconds: maximum audio in a batch; a batch has one excerpt or more.
        crop: longest excerpt in seconds.
        seed, epoch: determine all random draws.
    """
    rng = generator(seed, epoch, "", "batches")
    weights = [rng.uniform(1 - _JITTER, 1 + _JITTER) for _ in utterances]
    longest = round(crop * SAMPLE_RATE)
    order = sorted(
        range(len(utterances)), key=lambda i: (-min(utterances[i].length, longest) * weights[i], i)
    )
    rows = [TableUtterance(str(i), utterances[i].length) for i in order]
    groups = bucket(rows, _UNLIMITED, round(seconds * SAMPLE_RATE), longest)
    rng.shuffle(groups)
    return [
        _batch(epoch, position, [int(row.path) for row in group], utterances, longest, rng)
        for position, group in enumerate(groups)
    ]


def _batch(
    epoch: int,
    position: int,
    group: list[int],
    utterances: Sequence[CorpusUtterance],
    longest: int,
    rng: random.Random,
) -> PlannedBatch:
    frames = frame_count(min(longest, *(utterances[i].length for i in group)))
    frames -= frames % 2  # for odd numbers s3prl's HuBERT pads and masks attention
    excerpts = []
    for index in group:
        last_start = (utterances[index].length - sample_count(frames)) // HOP
        excerpts.append((index, rng.randint(0, last_start)))
    return PlannedBatch(epoch, position, tuple(excerpts), frames)


class EndlessBatchSampler:
    """Endless sampler of batches for a DataLoader, from ``position`` in ``epoch`` on."""

    def __init__(
        self,
        utterances: Sequence[CorpusUtterance],
        seconds: float,
        crop: float,
        seed: int,
        epoch: int,
        position: int,
    ):
        self.arguments = (utterances, seconds, crop, seed)
        self.epoch, self.position = epoch, position

    def __iter__(self) -> Iterator[PlannedBatch]:
        epoch, position = self.epoch, self.position
        while True:
            yield from epoch_batches(*self.arguments, epoch)[position:]
            epoch, position = epoch + 1, 0
