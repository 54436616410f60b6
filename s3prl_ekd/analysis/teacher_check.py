"""Check the teachers of a config on this machine: parameters, and the fast path's hidden states."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..data.audio_files import SAMPLE_RATE
from ..distill.settings import TeacherSettings
from ..distill.teachers import StatedOutputs, Teacher, measure_outputs
from ..errors import EkdError
from ..files.weights_digest import weights_digest
from ..teachers import load_upstream
from ..teachers.fast.encoder import fast_encoders
from ..teachers.huggingface import HuggingFaceUpstream
from ..teachers.names import pin_teachers
from ..teachers.published import published_parameters

TOLERANCE = 1e-3  # relative to a layer's largest value (ours); rounding is below 1e-4
SHORTER = 0.6  # length of the second utterance of the padded batch, of the first's


@dataclass(frozen=True)
class TeacherReport:
    """What was seen of one teacher.

    Attributes:
        name: in the config.
        model: as in the config, with the commit if it is on the Hugging Face Hub.
        problem: why the teacher cannot be used; the other fields are then empty.
        upstream: the class that computes hidden states.
        digest: of the weights.
        parameters, published: their number, and the published one if it is known.
        layers, widths: number of hidden states, and their widths.
        path: what was compared with what.
        differences: name of an input -> for each hidden state, the largest difference, relative to
            its largest value; empty if there is nothing to compare.
        seconds: duration of both forwards of the last input, the reference's first.
    """

    name: str
    model: str
    problem: str = ""
    upstream: str = ""
    digest: str = ""
    parameters: int = 0
    published: int | None = None
    layers: int = 0
    widths: tuple[int, ...] = ()
    path: str = ""
    differences: Mapping[str, Sequence[float]] | None = None
    seconds: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as JSON data, in which numbers that are not finite are null."""
        data = {**vars(self), "largest_difference": self.largest_difference}
        text = json.dumps({**data, "verdict": self.verdict})
        result: dict[str, Any] = json.loads(text, parse_constant=lambda name: None)
        return result

    @property
    def largest_difference(self) -> float | None:
        """Over all inputs and layers; None if nothing was compared."""
        values = [value for layers in (self.differences or {}).values() for value in layers]
        # max() ignores NaN unless it is the first
        return max(values, key=lambda v: float("inf") if v != v else v) if values else None

    @property
    def verdict(self) -> str:
        """``ok``, or what is wrong."""
        if self.problem:
            return self.problem
        problems = []
        if self.published is not None and self.parameters != self.published:
            problems.append(f"{self.parameters:,} parameters, not the published {self.published:,}")
        difference = self.largest_difference
        if difference is not None and not difference <= TOLERANCE:
            problems.append(
                f"hidden states differ by {difference:.1e} (allowed: {TOLERANCE:.0e}); use "
                "teacher_backend: s3prl"
            )
        return "; ".join(problems) or "ok"


def check_teachers(teachers: Mapping[str, TeacherSettings], wave: Tensor) -> list[TeacherReport]:
    """Load each teacher and check it; a teacher that cannot be loaded does not stop the others.

    Args:
        teachers: of a model config.
        wave: ``[sample]`` at 16 kHz. Hidden states are compared on it alone, and on a padded batch
            of it and its beginning.
    """
    return [_check(name, settings, wave) for name, settings in teachers.items()]


def noise(seconds: float = 4.0) -> Tensor:
    """Noise with a slow envelope, ``[sample]``, in place of an utterance."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(1, 1, max(2, int(4 * seconds)), generator=generator)
    samples = int(seconds * SAMPLE_RATE)
    envelope = F.interpolate(steps, samples, mode="linear", align_corners=True)[0, 0]
    return 0.2 * envelope * torch.randn(samples, generator=generator)


def _check(name: str, settings: TeacherSettings, wave: Tensor) -> TeacherReport:
    model = settings.model
    try:
        model = pin_teachers({name: settings})[name].model
        upstream = load_upstream(model, f"teachers.{name}.model")
        teacher = Teacher(upstream, settings.targets, name)
        widths = set(_widths(upstream))
        path, differences, seconds = _compare(teacher, wave)
        return TeacherReport(
            name=name,
            model=model,
            upstream=f"{type(upstream).__module__}.{type(upstream).__qualname__}",
            digest=weights_digest(upstream),
            parameters=sum(parameter.numel() for parameter in upstream.parameters()),
            published=published_parameters(model),
            layers=teacher.depth + 1,
            widths=tuple(sorted(widths)),
            path=path,
            differences=differences,
            seconds=seconds,
        )
    except EkdError as error:
        published = published_parameters(model)
        return TeacherReport(name, model, problem=str(error), published=published)


def _widths(upstream: Any) -> tuple[int, ...]:
    """The width of each hidden state."""
    stated: StatedOutputs | None = getattr(upstream, "stated", None)  # of stored hidden states
    return (stated or measure_outputs(upstream)).widths


def _compare(
    teacher: Teacher, wave: Tensor
) -> tuple[str, dict[str, list[float]] | None, tuple[float, float] | None]:
    """Compare the forward that training uses with a reference; see :class:`TeacherReport`."""
    upstream: Any = teacher.upstream
    inputs = {
        "one utterance": [wave],
        "a padded batch": [wave, wave[: int(SHORTER * len(wave))]],
    }
    if hasattr(upstream, "stated"):
        return "stored hidden states: nothing to compare", None, None
    if isinstance(upstream, HuggingFaceUpstream):
        path = "our calls of transformers' modules with transformers' own forward"
        del inputs["a padded batch"]  # transformers masks other frames
        candidate: nn.Module = upstream
        reference: nn.Module = _TransformersForward(upstream)
    else:
        encoder = fast_encoders({"teacher": upstream}).get("teacher")
        if encoder is None:
            return "no fast path: the upstream's own forward is used", None, None
        path = "our fast path with s3prl's upstream"
        candidate, reference = _FastForward(encoder, teacher.depth), upstream
    differences, seconds = {}, (0.0, 0.0)
    for name, waves in inputs.items():
        with torch.no_grad():
            start = time.perf_counter()
            expected = reference(waves)["hidden_states"]
            middle = time.perf_counter()
            states = candidate(waves)["hidden_states"]
            seconds = (middle - start, time.perf_counter() - middle)
        frames = [int(teacher.frames(len(wave))) for wave in waves]
        differences[name] = [
            _difference(state, other, frames) for state, other in zip(states, expected, strict=True)
        ]
    return path, differences, seconds


def _difference(states: Tensor, expected: Tensor, frames: Sequence[int]) -> float:
    """The largest difference in valid frames of ``[batch, frame, dim]``, relative."""
    if states.shape != expected.shape:
        return float("inf")
    pairs = [(a[:n], b[:n]) for a, b, n in zip(states, expected, frames, strict=True)]
    largest = max(float(b.abs().max()) for _, b in pairs)
    # NaN must not be lost: max() of floats would ignore it
    worst = torch.stack([(a - b).abs().max() for a, b in pairs]).max()
    return float(worst) / (largest or 1.0)


class _FastForward(nn.Module):
    """The fast path as an upstream."""

    def __init__(self, encoder: Any, depth: int):
        super().__init__()
        self._encoder, self._layers = encoder, range(depth + 1)

    def forward(self, waves: list[Tensor]) -> dict[str, list[Tensor]]:
        padded = pad_sequence(waves, batch_first=True)
        states = self._encoder.hidden_states(padded, [len(wave) for wave in waves], self._layers)
        return {"hidden_states": [states[layer] for layer in self._layers]}


class _TransformersForward(nn.Module):
    """transformers' own forward of a Hugging Face teacher, for a single waveform."""

    def __init__(self, upstream: HuggingFaceUpstream):
        super().__init__()
        self._network, self._normalize = upstream.network, upstream.normalize

    def forward(self, waves: list[Tensor]) -> dict[str, list[Tensor]]:
        (wave,) = waves
        wave = F.layer_norm(wave, wave.shape) if self._normalize else wave
        out = self._network(wave[None], output_hidden_states=True)
        # versions 4 and 5 differ in the last of hidden_states of a pre-norm model
        return {"hidden_states": [*out.hidden_states[:-1], out.last_hidden_state]}


def summary(reports: Sequence[TeacherReport]) -> list[tuple[str, ...]]:
    """The reports as the rows of a table, with a head."""
    rows: list[tuple[str, ...]] = [
        ("teacher", "model", "parameters", "published", "states", "difference", "verdict")
    ]
    for report in reports:
        difference = report.largest_difference
        rows.append(
            (
                report.name,
                report.model,
                f"{report.parameters:,}" if report.parameters else "-",
                "not known" if report.published is None else f"{report.published:,}",
                f"{report.layers} x {'/'.join(map(str, report.widths))}" if report.layers else "-",
                "-" if difference is None else f"{difference:.1e}",
                "ok" if report.verdict == "ok" else "failed",
            )
        )
    return rows
