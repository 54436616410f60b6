"""Unit labels: k-means clusters of frames, and the label of every frame of the corpus."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from s3prl_ekd.data.audio import read_audio
from s3prl_ekd.errors import DataError
from s3prl_ekd.essence.units import fit_units
from s3prl_ekd.files.atomic import atomic_file

from .corpus import Corpus, CorpusUtterance
from .frames import frame_count

Features = Callable[[Tensor], Tensor]  # [sample] -> [frame, dim]


@dataclass(frozen=True)
class FrameLabels:
    """Labels of all utterances, train then dev, concatenated.

    Those of utterance ``i`` are ``flat[offsets[i]:offsets[i + 1]]``.
    """

    flat: np.ndarray  # uint16
    offsets: np.ndarray  # int64
    centroids: np.ndarray  # [cluster, dim]

    @property
    def classes(self) -> int:
        return len(self.centroids)

    def of_utterance(self, index: int) -> np.ndarray:
        """The labels ``[frame]`` of one utterance."""
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    def baseline(self) -> tuple[float, float]:
        """Cross entropy (nats) and accuracy of a prediction from unit frequencies alone."""
        shares = np.bincount(self.flat, minlength=self.classes) / len(self.flat)
        used = shares[shares > 0]
        return -float((used * np.log(used)).sum()), float(shares.max())


def make_labels(
    corpus: Corpus, features: Features, clusters: int, max_frames: int, seed: int, name: str
) -> FrameLabels:
    """Fit k-means on frames of training utterances, and label all frames of the corpus.

    Args:
        corpus: corpus to label.
        features: function from a waveform to features.
        clusters: number of clusters.
        max_frames: random utterances are added until they have this many frames for k-means.
        seed: seed of the draw and of k-means.
        name: name of the features, for the progress bars.

    Raises:
        DataError: a file cannot be read, or there are fewer frames than clusters.
    """
    order = np.random.default_rng(seed).permutation(len(corpus.train))
    counts = np.cumsum([frame_count(corpus.train[i].length) for i in order])
    fitted = order[: int(np.searchsorted(counts, max_frames)) + 1]
    cached = {
        int(i): _frames(features, corpus.train[i]) for i in tqdm(fitted, desc=f"{name}: frames")
    }
    units = fit_units(torch.cat(list(cached.values())), clusters, seed, teacher=name, layer=0)
    per_utterance = []
    for index, utterance in enumerate(tqdm(corpus.all, desc=f"{name}: labels")):
        frames = cached[index] if index in cached else _frames(features, utterance)
        per_utterance.append(units.label(frames).numpy().astype(np.uint16))
    offsets = np.cumsum([0, *map(len, per_utterance)], dtype=np.int64)
    return FrameLabels(np.concatenate(per_utterance), offsets, units.centroids.numpy())


def _frames(features: Features, utterance: CorpusUtterance) -> Tensor:
    frames = features(read_audio(utterance.path)[: utterance.length]).float().cpu()
    if len(frames) != frame_count(utterance.length):
        raise DataError(
            f"{utterance.path} has {len(frames)} frames, but {frame_count(utterance.length)} by "
            "its header; replace the file"
        )
    return frames


def save_labels(labels: FrameLabels, path: Path) -> None:
    """Write the labels atomically."""
    with atomic_file(path) as file:
        np.savez_compressed(
            file, flat=labels.flat, offsets=labels.offsets, centroids=labels.centroids
        )


def load_labels(path: Path, corpus: Corpus) -> FrameLabels:
    """Read the file of :func:`save_labels`.

    Raises:
        DataError: the file is damaged, or belongs to another corpus.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            labels = FrameLabels(file["flat"], file["offsets"], file["centroids"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"cannot read {path} ({error}); delete it, and it is computed again"
        ) from None
    counts = [frame_count(utterance.length) for utterance in corpus.all]
    if np.diff(labels.offsets).tolist() != counts or len(labels.flat) != sum(counts):
        raise DataError(f"{path} belongs to another corpus; delete it, and it is computed again")
    return labels


def describe_labels(labels: FrameLabels) -> str:
    """Describe the labels and the baseline of predicting from frequencies alone."""
    loss, accuracy = labels.baseline()
    return (
        f"{len(labels.flat):,} frames, {labels.classes} units; baseline from unit frequencies: "
        f"accuracy {accuracy:.1%}, loss {loss:.2f} (uniform: {math.log(labels.classes):.2f})"
    )
