"""Units: clusters of frames, and the label of every frame of the corpus, kept in one file."""

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

from .corpus import Corpus, Utterance
from .frames import frame_count

Features = Callable[[Tensor], Tensor]  # [sample] -> [frame, dim]


@dataclass(frozen=True)
class UnitLabels:
    """``flat`` holds the labels of all utterances, one after the other, train then dev; those of
    utterance ``i`` are ``flat[offsets[i]:offsets[i + 1]]``."""

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
        """What knowing only how frequent each unit is gives: cross entropy (nats), accuracy."""
        shares = np.bincount(self.flat, minlength=self.classes) / len(self.flat)
        used = shares[shares > 0]
        return -float((used * np.log(used)).sum()), float(shares.max())


def make_labels(
    corpus: Corpus, features: Features, clusters: int, most: int, seed: int, name: str
) -> UnitLabels:
    """Cluster the frames of training utterances, and label all frames of all utterances.

    Args:
        corpus: what is labelled.
        features: of whole utterances.
        clusters: how many.
        most: utterances are drawn until they have so many frames; those are clustered.
        seed: of that draw and of the clustering.
        name: of what is clustered, for the progress bars.

    Raises:
        DataError: a file cannot be read, or there are fewer frames than clusters.
    """
    order = np.random.default_rng(seed).permutation(len(corpus.train))
    counts = np.cumsum([frame_count(corpus.train[i].length) for i in order])
    chosen = order[: int(np.searchsorted(counts, most)) + 1]
    known = {
        int(i): _frames(features, corpus.train[i]) for i in tqdm(chosen, desc=f"{name}: frames")
    }
    units = fit_units(torch.cat(list(known.values())), clusters, seed, teacher=name, layer=0)
    parts = []
    for index, utterance in enumerate(tqdm(corpus.all, desc=f"{name}: labels")):
        frames = known[index] if index in known else _frames(features, utterance)
        parts.append(units.label(frames).numpy().astype(np.uint16))
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return UnitLabels(np.concatenate(parts), offsets, units.centroids.numpy())


def _frames(features: Features, utterance: Utterance) -> Tensor:
    frames = features(read_audio(utterance.path)[: utterance.length]).float().cpu()
    if len(frames) != frame_count(utterance.length):
        raise DataError(
            f"{utterance.path} has {len(frames)} frames where its header says "
            f"{frame_count(utterance.length)}; make the file anew"
        )
    return frames


def save_labels(labels: UnitLabels, path: Path) -> None:
    """Whole or not at all."""
    with atomic_file(path) as file:
        np.savez_compressed(
            file, flat=labels.flat, offsets=labels.offsets, centroids=labels.centroids
        )


def load_labels(path: Path, corpus: Corpus) -> UnitLabels:
    """What :func:`save_labels` wrote.

    Raises:
        DataError: it is damaged, or of another corpus.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            labels = UnitLabels(file["flat"], file["offsets"], file["centroids"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it to make it anew") from None
    counts = [frame_count(utterance.length) for utterance in corpus.all]
    if np.diff(labels.offsets).tolist() != counts or len(labels.flat) != sum(counts):
        raise DataError(f"{path} is of another corpus; delete it to make it anew")
    return labels


def describe_labels(labels: UnitLabels) -> str:
    """A line on what there is to beat."""
    loss, accuracy = labels.baseline()
    return (
        f"{len(labels.flat):,} frames in {labels.classes} units; always the most frequent one is "
        f"right for {accuracy:.1%}, their frequencies alone give a loss of {loss:.2f} "
        f"(uniform: {math.log(labels.classes):.2f})"
    )
