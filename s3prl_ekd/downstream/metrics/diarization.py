"""DER of speaker diarisation, as SUPERB scores s3prl's predictions.

s3prl writes a probability for each frame and speaker. SUPERB makes speaker turns of them at five
thresholds, each without and with a median filter, scores all ten with dscore (NIST's md-eval) and
publishes the lowest DER. Times are whole milliseconds here, as in the files that dscore gives to
md-eval, so all sums are exact.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...data.audio_files import SAMPLE_RATE
from ...data.rttm import MAX_SPEAKERS, SpeakerTurns, read_rttm
from ...errors import DataError, SetupError
from ...files.text import check_regular, read_text
from .error_counts import ErrorCounts

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
MEDIANS = (1, 11)  # frames
_MAX_FRAMES = 1 << 24  # of a recording


def reference_turns(speakers: SpeakerTurns) -> list[np.ndarray]:
    """The turns of each speaker, ``[turn, 2]``: begin and end in milliseconds, as dscore rounds."""
    turns = []
    for own in speakers.values():
        begin, length = (1000 * np.array(own)).round().astype(np.int64).T
        turns.append(np.stack([begin, begin + length], axis=1))
    return turns


def read_probabilities(path: Path) -> np.ndarray:
    """Read the probabilities ``[frame, speaker]`` of a recording from s3prl's HDF5 file.

    Raises:
        SetupError: h5py is not installed.
        DataError: the file cannot be read.
    """
    try:
        import h5py
    except ImportError:
        raise SetupError(
            "the predictions of SD are HDF5 files, and h5py is not installed; type: pip install "
            "h5py"
        ) from None
    check_regular(path, "predictions", DataError)
    try:
        with h5py.File(path, "r") as file:
            if not isinstance(file.get("T_hat", getlink=True), h5py.HardLink):
                raise ValueError  # a link may lead to another file
            data = file["T_hat"]
            if data.ndim != 2 or data.dtype.kind != "f":
                raise ValueError
            if len(data) > _MAX_FRAMES or data.shape[1] > MAX_SPEAKERS:
                raise ValueError
            values = data[:]
    except (OSError, KeyError, ValueError, AttributeError, RuntimeError):
        raise DataError(
            f"{path} is not a prediction file of s3prl's diarization; evaluate the run again"
        ) from None
    if not np.isfinite(values).all():
        raise DataError(f"{path} has values that are not finite; the training has diverged")
    return values


def frame_times(frames: int, frame_shift: int) -> np.ndarray:
    """Begin of each frame and end of the last one, in milliseconds: ``[frame + 1]``.

    Rounded to 10 ms, as s3prl's ``make_rttm.py`` writes begins and lengths of turns.
    """
    seconds = (f"{frame * (frame_shift / SAMPLE_RATE):.2f}" for frame in range(frames + 1))
    return np.array([round(1000 * float(text)) for text in seconds], dtype=np.int64)


def speaker_turns(
    probabilities: np.ndarray, times: np.ndarray, threshold: float, median: int = 1
) -> list[np.ndarray]:
    """The turns of each speaker, ``[turn, 2]`` in milliseconds.

    Args:
        probabilities: ``[frame, speaker]``.
        times: of as many frames or more; see :func:`frame_times`.
        threshold: a speaker speaks in the frames above it.
        median: frames of the median filter; an odd number, 1 for none.
    """
    active = (probabilities > threshold).astype(np.int64)
    if median > 1:  # zeros before and after, as in scipy.signal.medfilt
        half = median // 2
        sums = np.cumsum(np.pad(active, ((half + 1, half), (0, 0))), axis=0)
        active = (sums[median:] - sums[:-median] > half).astype(np.int64)
    turns = []
    for frames in active.T:
        edges = np.flatnonzero(np.diff(frames, prepend=0, append=0))
        begin, end = edges[::2], edges[1::2]
        own = np.stack([times[begin], times[begin] + times[end - begin]], axis=1)
        turns.append(own[own[:, 0] < own[:, 1]])
    return turns


def count_errors(reference: Sequence[np.ndarray], system: Sequence[np.ndarray]) -> tuple[int, int]:
    """Milliseconds in error, and of reference speech, in one recording.

    Missed speech, false alarms and speech of the wrong speaker, without a collar and with
    overlapping speech, under the mapping of speakers that makes fewest errors. A moment with two
    speakers counts twice.

    Args:
        reference, system: turns ``[turn, 2]`` of each speaker. Turns of a speaker may overlap.
    """
    edges = np.unique(np.concatenate([turns.ravel() for turns in (*reference, *system)]))
    lengths = np.diff(edges)
    ref, sys = _activity(reference, edges), _activity(system, edges)
    both = (ref * lengths) @ sys.T.astype(np.int64)  # [reference speaker, system speaker]
    if len(ref) > len(sys):
        both = both.T
    rows, columns = range(len(both)), range(both.shape[1])
    mapped = max(int(both[rows, list(p)].sum()) for p in itertools.permutations(columns, len(both)))
    ref_count, sys_count = ref.sum(axis=0), sys.sum(axis=0)
    errors = int((np.maximum(ref_count, sys_count) * lengths).sum()) - mapped
    return errors, int((ref_count * lengths).sum())


def _activity(speakers: Sequence[np.ndarray], edges: np.ndarray) -> np.ndarray:
    """Whether each speaker speaks between two edges: bool ``[speaker, edge - 1]``."""
    steps = np.zeros((len(speakers), len(edges)), dtype=np.int64)
    for row, turns in zip(steps, speakers, strict=True):
        np.add.at(row, np.searchsorted(edges, turns[:, 0]), 1)
        np.add.at(row, np.searchsorted(edges, turns[:, 1]), -1)
    return np.cumsum(steps, axis=1)[:, :-1] > 0


def diarisation_errors(
    reference: Mapping[str, SpeakerTurns],
    predictions: Mapping[str, np.ndarray],
    frame_shift: int,
) -> ErrorCounts:
    """Errors of each recording at the threshold and median filter with the lowest DER of all.

    Args:
        reference: recording -> turns of its speakers, in seconds.
        predictions: recording -> probabilities ``[frame, speaker]``; the same recordings.
        frame_shift: samples of a frame.
    """
    names = tuple(sorted(reference))
    times = frame_times(max(map(len, predictions.values())), frame_shift)
    truth = {name: reference_turns(reference[name]) for name in names}
    turns = hashlib.sha256(json.dumps(reference, sort_keys=True).encode()).digest()
    best: ErrorCounts | None = None
    for median, threshold in itertools.product(MEDIANS, THRESHOLDS):
        counts = [
            count_errors(
                truth[name],
                speaker_turns(predictions[name], times, threshold, median),
            )
            for name in names
        ]
        errors, lengths = np.array(counts, dtype=np.int64).T
        if best is None or errors.sum() < best.errors.sum():
            best = ErrorCounts(names, errors, lengths, texts=turns)
    assert best is not None
    return best


def read_frame_shift(path: Path) -> int:
    """Read the samples of a frame, which s3prl writes next to the predictions."""
    text = read_text(path, "frame shift", DataError).strip()
    if not text.isdecimal() or not 0 < int(text[:9]) <= SAMPLE_RATE or len(text) > 9:
        raise DataError(f"{path} must have a number of samples, got {text[:40]!r}")
    return int(text)


def measure(predictions: Path, frame_shift: Path, rttm: Path) -> ErrorCounts:
    """The errors of each recording, from the files of a test.

    Raises:
        DataError: a file cannot be read, or the predictions are not those of the reference's
            recordings.
    """
    reference = read_rttm(rttm)
    paths = {path.name[: -len(".h5")]: path for path in predictions.glob("*.h5")}
    differing = sorted(paths.keys() ^ reference.keys())
    if differing:
        raise DataError(
            f"{predictions} and {rttm.name} have different recordings: {differing[0]} is in only "
            f"one of them; remove {predictions.parent} and evaluate the run again"
        )
    shift = read_frame_shift(frame_shift)
    values = {name: read_probabilities(path) for name, path in paths.items()}
    return diarisation_errors(reference, values, shift)
