"""Run an upstream over the excerpts of a task, and score its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.audio import Recording
from ..errors import DataError
from .classifiers import predict_by_lda, predict_by_ridge
from .conditions import NoisyCondition
from .tasks import ALWAYS_TRAIN, SCORES, ProbeExcerpt, ProbeTask

CLEAN = "clean"
MOST_DIMS = 2048  # of all layers together; wider ones are reduced by principal components
_SAMPLE, _FRAMES = 100, 50  # excerpts, and frames of each, for the components
StatesFn = Callable[[Tensor], Sequence[Tensor]]  # [sample] -> [frame, dim] of each layer


@dataclass(frozen=True, eq=False)
class ProbeScore:
    """Accuracy of one probe under one condition.

    Attributes:
        score: key of :data:`tasks.SCORES`.
        condition: ``clean``, or the name of a :class:`conditions.NoisyCondition`.
        names: test utterances.
        errors, counts: wrong and all examples of each utterance, ``[utterance]``.
        layers: accuracy in per cent of each layer alone; empty if not computed.
    """

    score: str
    condition: str
    names: tuple[str, ...]
    errors: np.ndarray
    counts: np.ndarray
    layers: tuple[float, ...] = ()

    @property
    def accuracy(self) -> float:
        """Per cent, all layers side by side."""
        return 100 - 100 * float(self.errors.sum() / self.counts.sum())


def probe(
    states_of: StatesFn,
    tasks: Sequence[ProbeTask],
    noisy: NoisyCondition | None = None,
    *,
    stride: int = 320,
    by_layer: bool = False,
    bar: str = "",
) -> list[ProbeScore]:
    """Probe frozen hidden states.

    Args:
        states_of: gives the hidden states of a waveform.
        tasks: what to probe.
        noisy: also test under this condition; the training is always clean.
        stride: samples from a frame to the next.
        by_layer: also score each layer alone.
        bar: name of the progress bar; "": none.

    Raises:
        DataError: hidden states are not finite, or none of a fold has a label.
    """
    results = []
    for task in tasks:
        label = f"{bar}: {task.label}" if bar else None
        results += _probe_task(states_of, task, noisy, stride, by_layer, label)
    return results


def _probe_task(states_of, task, noisy, stride, by_layer, bar) -> list[ProbeScore]:
    reduce = _fit_reduction(states_of, task.excerpts)
    conditions = [CLEAN] if noisy is None else [CLEAN, noisy.name]
    collected = {name: _Examples(len(conditions)) for name in task.scores}
    for number, excerpt in enumerate(tqdm(task.excerpts, desc=bar, disable=bar is None)):
        wave = _read(excerpt)
        states = reduce(_run(states_of, wave, excerpt))
        heard = [states] * len(conditions)
        if noisy is not None and excerpt.fold != ALWAYS_TRAIN:
            heard[1] = reduce(_run(states_of, noisy(wave), excerpt))
        for parts in zip(*(task.examples(h, excerpt, stride) for h in heard), strict=True):
            name, _, labels = parts[0]
            features = [part[1] for part in parts]
            collected[name].add(features, labels, number, excerpt.fold)
    blocks = reduce.blocks
    return [
        score
        for name, examples in collected.items()
        for score in examples.score(name, conditions, task, blocks if by_layer else [])
    ]


class _Examples:
    """Examples of one score: features of each condition, labels, excerpts and folds."""

    def __init__(self, conditions: int):
        self.features: list[list[np.ndarray]] = [[] for _ in range(conditions)]
        self.labels: list[str] = []
        self.excerpts: list[int] = []
        self.folds: list[int] = []

    def add(self, features: list[np.ndarray], labels: list[str], excerpt: int, fold: int) -> None:
        for parts, part in zip(self.features, features, strict=True):
            parts.append(part)
        self.labels += labels
        self.excerpts += [excerpt] * len(labels)
        self.folds += [fold] * len(labels)

    def score(
        self, name: str, conditions: list[str], task: ProbeTask, blocks: list[slice]
    ) -> list[ProbeScore]:
        if not self.labels:
            raise DataError(f"{name}: no frame has a label; check the column segments")
        predict = predict_by_ridge if SCORES[name][0] == "ridge" else predict_by_lda
        numbers = {label: number for number, label in enumerate(sorted(set(self.labels)))}
        labels = np.array([numbers[label] for label in self.labels])
        folds = np.array(self.folds)
        for fold in range(max(e.fold for e in task.excerpts) + 1):
            if not (folds == fold).any():
                speakers = {e.utterance.speaker for e in task.excerpts if e.fold == fold}
                raise DataError(
                    f"{name}: no frame of {', '.join(sorted(speakers))} has a label; check their "
                    "segments, or remove their lines"
                )
        tests = [np.concatenate(parts) for parts in self.features]

        def wrong(columns: np.ndarray | slice) -> list[np.ndarray]:
            parts = [features[:, columns] for features in tests]
            return [p != labels for p in predict(parts[0], labels, folds, parts)]

        width = tests[0].shape[1]
        pooled = width // blocks[-1].stop if blocks else 1  # mean and deviation: 2
        layers = []
        for block in blocks:
            offsets = [part * width // pooled for part in range(pooled)]
            columns = np.concatenate([np.arange(block.start, block.stop) + o for o in offsets])
            layers.append(wrong(columns))
        names = [task.excerpts[number].utterance.name for number in self.excerpts]
        tested = folds != ALWAYS_TRAIN
        result = []
        for number, (condition, errors) in enumerate(
            zip(conditions, wrong(slice(None)), strict=True)
        ):
            own = tuple(100 - 100 * float(layer[number][tested].mean()) for layer in layers)
            utterances, rows = np.unique(np.array(names)[tested], return_inverse=True)
            result.append(
                ProbeScore(
                    name,
                    condition,
                    tuple(utterances.tolist()),
                    np.bincount(rows, errors[tested]),
                    np.bincount(rows),
                    own,
                )
            )
        return result


class _Reduction:
    """Layers side by side, reduced to :data:`MOST_DIMS` in all by principal components.

    Attributes:
        blocks: the columns of each layer.
    """

    def __init__(self, bases: list[np.ndarray | None], widths: list[int]):
        self.bases = bases
        ends = np.cumsum(widths)
        self.blocks = [slice(int(e) - w, int(e)) for e, w in zip(ends, widths, strict=True)]

    def __call__(self, layers: list[np.ndarray]) -> np.ndarray:
        parts = [
            layer if basis is None else layer @ basis
            for layer, basis in zip(layers, self.bases, strict=True)
        ]
        return np.concatenate(parts, axis=1)


def _fit_reduction(states_of: StatesFn, excerpts: Sequence[ProbeExcerpt]) -> _Reduction:
    """Principal components of each layer from some excerpts, if the layers are wide."""
    first = _run(states_of, _read(excerpts[0]), excerpts[0])
    widths = [layer.shape[1] for layer in first]
    if sum(widths) <= MOST_DIMS:
        return _Reduction([None] * len(widths), widths)
    chosen = [excerpts[i] for i in np.linspace(0, len(excerpts) - 1, _SAMPLE).astype(int)]
    samples = [
        [
            layer[:: max(1, len(layer) // _FRAMES)]
            for layer in _run(states_of, _read(excerpt), excerpt)
        ]
        for excerpt in chosen
    ]
    dims = [min(width, MOST_DIMS // len(widths)) for width in widths]
    bases: list[np.ndarray | None] = []
    for number, dim in enumerate(dims):
        frames = np.concatenate([layers[number] for layers in samples]).astype(np.float64)
        _, vectors = np.linalg.eigh(np.cov(frames, rowvar=False))
        bases.append(vectors[:, : -dim - 1 : -1].astype(np.float32))
    return _Reduction(bases, dims)


def _read(excerpt: ProbeExcerpt) -> Tensor:
    with Recording(excerpt.utterance.part) as recording:
        return recording.read_speech(excerpt.start, excerpt.length)


@torch.no_grad()
def _run(states_of: StatesFn, wave: Tensor, excerpt: ProbeExcerpt) -> list[np.ndarray]:
    states = [state.float().cpu().numpy() for state in states_of(wave)]
    for number, state in enumerate(states):
        if not np.isfinite(state).all():
            raise DataError(
                f"{excerpt.utterance.name}: hidden state {number} has numbers that are not finite; "
                "the upstream may have diverged in its training"
            )
    return states
