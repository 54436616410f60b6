"""What is probed: the tasks that a manifest's labels allow, and the examples of each.

Phones: 5 folds over speakers, so that those of the test are unseen; an example is a frame, or the
mean over a segment. Speakers: excerpts of 1 s; training on the split train, test on the split test.
Emotions: one speaker is left out at a time (10 folds, if there are more speakers). An excerpt of a
speaker and an utterance of an emotion are the means and deviations over their frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..data.audio_files import SAMPLE_RATE
from ..data.lengths import measure_audio
from ..data.manifest.phones import SILENCE
from ..errors import DataError
from .labels import LabelledUtterance, speaker_folds

PHONE_FOLDS, EMOTION_FOLDS = 5, 10
EXCERPT = SAMPLE_RATE  # samples of an excerpt of the speaker task
SHORTEST = SAMPLE_RATE // 10  # samples; shorter utterances and excerpts are left out
PHONE_SAMPLES = 3600 * SAMPLE_RATE  # of phones, as all frames are kept in memory
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


def choose_tasks(
    utterances: Sequence[LabelledUtterance], note: Callable[[str], object] = lambda text: None
) -> list[ProbeTask]:
    """The tasks for which one manifest has labels.

    Args:
        utterances: of the manifest.
        note: is called with each reason why a task or some utterances are left out.

    Raises:
        DataError: no task can be probed, or an audio file cannot be read.
    """
    lengths = dict(zip(utterances, _samples(utterances), strict=True))
    usable = [u for u in utterances if lengths[u] >= SHORTEST]
    if len(usable) < len(utterances):
        note(f"{len(utterances) - len(usable)} utterances are shorter than 0.1 s and left out")
    tasks, reasons = [], []
    for make in (_phone_task, _speaker_task, _emotion_task):
        try:
            tasks.append(make(usable, lengths))
        except _Missing as missing:
            reasons.append(str(missing))
    if not tasks:
        raise DataError("nothing can be probed: " + "; ".join(reasons))
    for reason in reasons:
        note(f"not probed: {reason}")
    for task in tasks:
        if task.label == "phones" and len(task.excerpts) < len(_aligned(usable)):
            note(f"phones: {len(task.excerpts)} utterances, an hour, evenly spaced in the manifest")
    return tasks


class _Missing(Exception):
    """Why a manifest does not allow a task."""


Lengths = Mapping[LabelledUtterance, int]  # samples


def _by_speaker(
    utterances: Sequence[LabelledUtterance],
    lengths: Lengths,
    label: Literal["phones", "emotion"],
    folds: int,
) -> ProbeTask:
    if not utterances or any(not utterance.speaker for utterance in utterances):
        raise _Missing(f"{label} needs its labels and the speaker of each utterance")
    fold_of = speaker_folds(utterances, folds)
    if len(set(fold_of.values())) < 3:
        raise _Missing(f"{label} needs three speakers or more")
    excerpts = [ProbeExcerpt(u, 0, lengths[u], fold_of[u.speaker]) for u in utterances]
    return ProbeTask(label, tuple(excerpts))


def _aligned(utterances: Sequence[LabelledUtterance]) -> list[LabelledUtterance]:
    return [u for u in utterances if any(s.phone != SILENCE for s in u.segments)]


def _phone_task(utterances: Sequence[LabelledUtterance], lengths: Lengths) -> ProbeTask:
    aligned = _aligned(utterances)
    total = sum(lengths[u] for u in aligned)
    if total > PHONE_SAMPLES:
        step = total / PHONE_SAMPLES
        aligned = [aligned[int(i * step)] for i in range(int(len(aligned) / step))]
    return _by_speaker(aligned, lengths, "phones", PHONE_FOLDS)


def _emotion_task(utterances: Sequence[LabelledUtterance], lengths: Lengths) -> ProbeTask:
    task = _by_speaker([u for u in utterances if u.emotion], lengths, "emotion", EMOTION_FOLDS)
    for fold in {excerpt.fold for excerpt in task.excerpts}:
        emotions = [e.utterance.emotion for e in task.excerpts if e.fold != fold]
        if len(set(emotions)) < 2:
            raise _Missing("emotion needs two emotions or more in the training part of each fold")
        if len(emotions) <= len(set(emotions)):
            raise _Missing(
                "emotion needs more utterances than emotions in the training part of each fold"
            )
    return task


def _speaker_task(utterances: Sequence[LabelledUtterance], lengths: Lengths) -> ProbeTask:
    used = [u for u in utterances if u.speaker and u.split != "dev"]
    train = {u.speaker for u in used if u.split == "train"}
    test = {u.speaker for u in used if u.split == "test"}
    if len(train) < 2:
        raise _Missing("speaker needs two speakers or more in the split train")
    if not test:
        raise _Missing("speaker needs utterances of the split test")
    if unknown := sorted(test - train):
        raise _Missing(f"the speaker {unknown[0]} is in test but not in train")
    excerpts = []
    for utterance in used:
        length = lengths[utterance]
        fold = 0 if utterance.split == "test" else ALWAYS_TRAIN
        for start in range(0, max(1, length - EXCERPT + 1), EXCERPT):
            excerpts.append(ProbeExcerpt(utterance, start, min(EXCERPT, length), fold))
    if sum(excerpt.fold == ALWAYS_TRAIN for excerpt in excerpts) <= len(train):
        raise _Missing("speaker needs more excerpts of 1 s than speakers in the split train")
    return ProbeTask("speaker", tuple(excerpts))


def _samples(utterances: Sequence[LabelledUtterance]) -> list[int]:
    lengths = []
    for audio in measure_audio("", [utterance.part for utterance in utterances]):
        if isinstance(audio, DataError):
            raise audio
        lengths.append(audio.samples)
    return lengths
