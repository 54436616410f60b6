"""What is probed: the tasks that a manifest's labels allow, and the examples of each.

Phones: 5 folds over speakers, so that those of the test are unseen; an example is a frame, or the
mean over a segment. Speakers: excerpts of 1 s; training on the split train, test on the split test.
Emotions: one speaker is left out at a time (10 folds, if there are more speakers). An excerpt of a
speaker and an utterance of an emotion are the means and deviations over their frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..data.audio_files import SAMPLE_RATE, read_headers
from ..errors import DataError
from .labels import SILENCE, LabelledUtterance, speaker_folds

PHONE_FOLDS, EMOTION_FOLDS = 5, 10
EXCERPT = SAMPLE_RATE  # samples of an excerpt of the speaker task
ALWAYS_TRAIN = -1  # fold of an example that is never tested
WINDOW = 400  # samples that a frame covers, 25 ms; its centre decides its phone

Classifier = Literal["ridge", "lda"]
# Name of the scores -> classifier, what one example is
SCORES: dict[str, tuple[Classifier, str]] = {
    "phone frames": ("ridge", "frame"),
    "phone segments": ("ridge", "segment"),
    "speaker": ("lda", "excerpt of 1 s"),
    "emotion": ("lda", "utterance"),
}


@dataclass(frozen=True)
class ProbeExcerpt:
    """A part of an utterance that the upstream hears alone, and the fold in which it is tested."""

    utterance: LabelledUtterance
    start: int  # samples
    length: int  # samples
    fold: int


@dataclass(frozen=True)
class ProbeTask:
    """The excerpts of one kind of label."""

    label: Literal["phones", "speaker", "emotion"]
    excerpts: tuple[ProbeExcerpt, ...]

    @property
    def scores(self) -> tuple[str, ...]:
        """The keys of :data:`SCORES` that this task gives."""
        return ("phone frames", "phone segments") if self.label == "phones" else (self.label,)

    def examples(
        self, states: np.ndarray, excerpt: ProbeExcerpt, stride: int
    ) -> Iterator[tuple[str, np.ndarray, list[str]]]:
        """The examples of an excerpt.

        Args:
            states: hidden states ``[frame, dim]``.
            excerpt: of which they are.
            stride: samples from a frame to the next.

        Yields:
            (key of :data:`SCORES`, features ``[example, dim]``, label of each example).
        """
        if self.label != "phones":
            pooled = np.concatenate([states.mean(0), states.std(0)])
            yield self.label, pooled[None], [getattr(excerpt.utterance, self.label)]
            return
        centres = np.arange(len(states)) * stride + WINDOW // 2
        segments = [s for s in excerpt.utterance.segments if s.phone != SILENCE]
        inside = [np.flatnonzero((s.start <= centres) & (centres < s.end)) for s in segments]
        known = [
            (s.phone, frames) for s, frames in zip(segments, inside, strict=True) if len(frames)
        ]
        if known:
            kept = np.concatenate([frames for _, frames in known])
            names = [phone for phone, frames in known for _ in frames]
            yield "phone frames", states[kept], names
            means = np.stack([states[frames].mean(0) for _, frames in known])
            yield "phone segments", means, [phone for phone, _ in known]


def choose_tasks(utterances: Sequence[LabelledUtterance]) -> list[ProbeTask]:
    """The tasks for which one manifest has labels.

    Raises:
        DataError: no task can be probed, or an audio file cannot be read.
    """
    tasks, reasons = [], []
    for make in (_phone_task, _speaker_task, _emotion_task):
        try:
            tasks.append(make(utterances))
        except _Missing as reason:
            reasons.append(str(reason))
    if not tasks:
        raise DataError("nothing can be probed: " + "; ".join(reasons))
    return tasks


class _Missing(Exception):
    """Why a manifest does not allow a task."""


def _by_speaker(
    utterances: Sequence[LabelledUtterance], label: Literal["phones", "emotion"], folds: int
) -> ProbeTask:
    if not utterances or any(not utterance.speaker for utterance in utterances):
        raise _Missing(f"{label} needs its labels and the speaker of each utterance")
    fold_of = speaker_folds(utterances, folds)
    if len(set(fold_of.values())) < 3:
        raise _Missing(f"{label} needs three speakers or more")
    lengths = _samples(utterances)
    excerpts = [
        ProbeExcerpt(utterance, 0, length, fold_of[utterance.speaker])
        for utterance, length in zip(utterances, lengths, strict=True)
    ]
    return ProbeTask(label, tuple(excerpts))


def _phone_task(utterances: Sequence[LabelledUtterance]) -> ProbeTask:
    return _by_speaker([u for u in utterances if u.segments], "phones", PHONE_FOLDS)


def _emotion_task(utterances: Sequence[LabelledUtterance]) -> ProbeTask:
    labelled = [u for u in utterances if u.emotion]
    if len({u.emotion for u in labelled}) < 2:
        raise _Missing("emotion needs two emotions or more")
    return _by_speaker(labelled, "emotion", EMOTION_FOLDS)


def _speaker_task(utterances: Sequence[LabelledUtterance]) -> ProbeTask:
    used = [u for u in utterances if u.speaker and u.split != "dev"]
    train = {u.speaker for u in used if u.split == "train"}
    test = {u.speaker for u in used if u.split == "test"}
    if len(train) < 2 or not test or not test <= train:
        raise _Missing("speaker needs two speakers or more, and those of the split test in train")
    excerpts = []
    for utterance, length in zip(used, _samples(used), strict=True):
        fold = 0 if utterance.split == "test" else ALWAYS_TRAIN
        for start in range(0, max(1, length - EXCERPT + 1), EXCERPT):
            excerpts.append(ProbeExcerpt(utterance, start, min(EXCERPT, length), fold))
    return ProbeTask("speaker", tuple(excerpts))


def _samples(utterances: Sequence[LabelledUtterance]) -> list[int]:
    lengths = []
    headers = read_headers("", [str(u.path) for u in utterances])
    for header in headers:
        if isinstance(header, DataError):
            raise header
        lengths.append(header.samples)
    return lengths
