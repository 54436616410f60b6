"""Phone labels of frames, from forced alignments, for a teacher that is trained with labels (ours).

The manifest of the corpus has a column ``segments``, as ``s3prl-ekd prepare alignments`` writes it.
"""

from __future__ import annotations

import numpy as np

from s3prl_ekd.data.manifest.phones import SILENCE
from s3prl_ekd.errors import DataError

from .corpus import Corpus, CorpusUtterance
from .frames import HOP, WINDOW, frame_count
from .labels import FrameLabels


def phone_labels(corpus: Corpus) -> FrameLabels:
    """Label each frame by the phone at its middle; what no segment covers is silence, class 0.

    Raises:
        DataError: an utterance has no segments.
    """
    phones = {s.phone for u in corpus.all for s in u.segments} - {SILENCE}
    classes = {name: i for i, name in enumerate([SILENCE, *sorted(phones)])}
    per_utterance = [_labels(utterance, classes) for utterance in corpus.all]
    offsets = np.cumsum([0, *map(len, per_utterance)], dtype=np.int64)
    return FrameLabels(np.concatenate(per_utterance), offsets, np.zeros((len(classes), 0)))


def _labels(utterance: CorpusUtterance, classes: dict[str, int]) -> np.ndarray:
    if not utterance.segments:
        raise DataError(
            f"{utterance.path} has no segments; give --manifest a table whose utterances all have "
            "them (s3prl-ekd prepare alignments writes it), and no other folder"
        )
    middles = np.arange(frame_count(utterance.length)) * HOP + WINDOW // 2
    labels = np.zeros(len(middles), np.uint16)
    for segment in utterance.segments:
        labels[(segment.start <= middles) & (middles < segment.end)] = classes[segment.phone]
    return labels
