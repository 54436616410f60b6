"""Results of the study: a small JSON file for each student, teacher and set of teachers.

A file has the errors and examples of each test speaker by score and condition, so that any mean,
difference and interval can be computed from the files alone.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from s3prl_ekd.errors import SetupError
from s3prl_ekd.files.atomic import write_text
from s3prl_ekd.files.text import read_json
from s3prl_ekd.probe.measure import ProbeScore

NOISY = "noisy"
SNR = 5.0  # dB of the noisy tests, in a simulated room
Counts = dict[str, tuple[float, float]]  # speaker -> errors, examples


@dataclass(frozen=True)
class StudyResult:
    """What the probes measured on one student (``seed`` from 1) or teacher or set (``seed`` 0).

    Attributes:
        row: name of the row, teacher or set.
        scores: (score, condition) -> counts of each test speaker.
        teachers: name -> digest of its file, equal for all rows of a seed.
    """

    row: str
    seed: int
    scores: dict[tuple[str, str], Counts]
    teachers: dict[str, str] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    loss: float | None = None  # on dev
    machine: str = ""

    def accuracy(self, score: str, condition: str) -> float:
        """Per cent over all speakers."""
        errors, examples = np.array([*self.scores[score, condition].values()]).sum(0)
        return 100 - 100 * float(errors / examples)


def by_speaker(score: ProbeScore, speaker_of: Callable[[str], str]) -> Counts:
    """Sums over the utterances of each speaker."""
    counts: Counts = {}
    for name, errors, examples in zip(score.names, score.errors, score.counts, strict=True):
        speaker = speaker_of(name)
        before = counts.get(speaker, (0, 0))
        counts[speaker] = (before[0] + int(errors), before[1] + int(examples))
    return counts


def write_result(result: StudyResult, path: Path) -> None:
    """Write a result atomically."""
    scores: dict[str, dict[str, Any]] = {}
    for (score, condition), counts in result.scores.items():
        scores.setdefault(score, {})[condition] = {k: list(v) for k, v in sorted(counts.items())}
    record = {**vars(result), "scores": scores}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read_result(path: Path) -> StudyResult:
    """Read a result.

    Raises:
        SetupError: the file is damaged.
    """
    record = read_json(path, "row", SetupError)
    try:
        scores = {
            (score, condition): {speaker: (c[0], c[1]) for speaker, c in counts.items()}
            for score, conditions in record.pop("scores").items()
            for condition, counts in conditions.items()
        }
        return StudyResult(**record, scores=scores)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise SetupError(f"{path} is damaged; delete it to measure it again") from None


def read_results(folder: Path) -> list[StudyResult]:
    """All results of a folder, by name of the file."""
    return [read_result(path) for path in sorted(folder.glob("*.json"))]


def machine() -> str:
    """Processor of this machine, for the record."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def probe_states(
    folder: Any, states_of: Callable[[Any], Sequence[Any]]
) -> dict[tuple[str, str], Counts]:
    """Probe hidden states on phones, speakers and emotions, clean and under noise in a room.

    Args:
        folder: the :class:`folder.StudyFolder`.
        states_of: waveform ``[sample]`` -> ``[frame, dim]`` of each layer.
    """
    from s3prl_ekd.downstream.noise import find_noises
    from s3prl_ekd.probe.conditions import NoisyCondition
    from s3prl_ekd.probe.labels import read_labels
    from s3prl_ekd.probe.measure import probe
    from s3prl_ekd.probe.tasks import choose_tasks

    noisy = NoisyCondition(NOISY, find_noises(folder.test_noise), SNR, room=True)
    tasks, speakers = [], {}
    for name in ("phones", "speaker", "emotion"):
        utterances = read_labels(folder.label_path(name))
        tasks += [task for task in choose_tasks(utterances) if task.label == name]
        speakers |= {utterance.name: utterance.speaker for utterance in utterances}
    scores = probe(states_of, tasks, noisy)
    return {(s.score, s.condition): by_speaker(s, speakers.__getitem__) for s in scores}
