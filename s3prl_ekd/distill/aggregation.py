"""How the chosen layers of several teachers become the student's targets.

Every aggregation turns ``{teacher: targets [batch, layer, frame, dim]}`` into
``{target set: targets [batch, layer, frame, width]}``; the student has one set of prediction heads
for each target set. The rest of the code does not know which aggregation it is.

``separate`` is the paper's multiple-prediction-head method, ``average`` and ``concat`` are its
layerwise-average and layerwise-concatenation (arXiv 2302.12757, abstract). That concatenated
targets are predicted by one wide head is *ours*: the paper's text does not settle it. "Layer"
stands for a target of a teacher: with ``teachers.NAME.groups`` (SKILL, arXiv 2402.16830) it is the
average of several layers, under any of the aggregations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import TeacherError
from .settings import DistillSettings

Targets = Mapping[str, Tensor]  # teacher or target set -> [batch, layer, frame, dim]
Weights = Mapping[str, float]  # teacher -> its share


@dataclass(frozen=True)
class TeacherShape:
    """What a teacher gives: the layers behind each of its targets, and their width."""

    targets: tuple[tuple[int, ...], ...]
    width: int


@dataclass(frozen=True)
class TargetSpec:
    """One target set: its number of layers, and its width in ``parts``.

    ``parts`` are the widths of the pieces along the feature axis: one for each teacher in
    ``concat``, and a single one in all other target sets.
    """

    layers: int
    parts: tuple[int, ...]

    @property
    def width(self) -> int:
        return sum(self.parts)


class Aggregation(ABC):
    """Turn the teachers' targets into target sets.

    Attributes:
        specs: the shape of each target set, by its name.
    """

    specs: dict[str, TargetSpec]

    @abstractmethod
    def __call__(self, teachers: Targets, weights: Weights) -> dict[str, Tensor]:
        """``{teacher: [batch, layer, frame, dim]}`` -> ``{target set: [batch, layer, frame,
        width]}``."""

    @abstractmethod
    def set_weights(self, weights: Weights) -> dict[str, float]:
        """The share of each target set in the loss."""

    def dim_weights(self, weights: Weights) -> dict[str, Tensor]:
        """Weights ``[width]`` for the target sets whose dimensions do not weigh the same."""
        return {}

    def per_teacher(self, predictions: Targets) -> dict[str, Tensor]:
        """The part of the predictions, ``[batch, layer, frame, dim]``, that is to be like each
        teacher; without the teachers that no part is to be like."""
        return {}


class PerTeacher(Aggregation):
    """Each teacher is a target set of its own: multiple prediction heads."""

    def __init__(self, teachers: Mapping[str, TeacherShape]):
        self.specs = {n: TargetSpec(len(t.targets), (t.width,)) for n, t in teachers.items()}

    def __call__(self, teachers: Targets, weights: Weights) -> dict[str, Tensor]:
        return {name: teachers[name] for name in self.specs}

    def set_weights(self, weights: Weights) -> dict[str, float]:
        return {name: weights[name] for name in self.specs}

    def per_teacher(self, predictions: Targets) -> dict[str, Tensor]:
        return {name: predictions[name] for name in self.specs}


class Average(Aggregation):
    """Layerwise average: one target set, the weighted mean of the teachers' layers."""

    def __init__(self, teachers: Mapping[str, TeacherShape]):
        self.teachers = tuple(teachers)
        width = one_width(teachers, "aggregation average")
        first = next(iter(teachers.values()))
        self.specs = {"average": TargetSpec(len(first.targets), (width,))}

    def __call__(self, teachers: Targets, weights: Weights) -> dict[str, Tensor]:
        total = sum(weights[name] for name in self.teachers)
        first, *others = (teachers[name] * (weights[name] / total) for name in self.teachers)
        return {"average": sum(others, first)}

    def set_weights(self, weights: Weights) -> dict[str, float]:
        return {"average": 1.0}

    def per_teacher(self, predictions: Targets) -> dict[str, Tensor]:
        return {name: predictions["average"] for name in self.teachers}


class Concat(Aggregation):
    """Layerwise concatenation: one target set, the teachers' layers side by side."""

    def __init__(self, teachers: Mapping[str, TeacherShape]):
        self.teachers = tuple(teachers)
        first = next(iter(teachers.values()))
        widths = tuple(teacher.width for teacher in teachers.values())
        self.specs = {"concat": TargetSpec(len(first.targets), widths)}

    def __call__(self, teachers: Targets, weights: Weights) -> dict[str, Tensor]:
        return {"concat": torch.cat([teachers[name] for name in self.teachers], dim=-1)}

    def set_weights(self, weights: Weights) -> dict[str, float]:
        return {"concat": 1.0}

    def dim_weights(self, weights: Weights) -> dict[str, Tensor]:
        if len({weights[name] for name in self.teachers}) == 1:
            return {}
        pieces = zip(self.teachers, self.specs["concat"].parts, strict=True)
        return {"concat": torch.cat([torch.full((n,), weights[name]) for name, n in pieces])}

    def per_teacher(self, predictions: Targets) -> dict[str, Tensor]:
        pieces = torch.split(predictions["concat"], list(self.specs["concat"].parts), dim=-1)
        return dict(zip(self.teachers, pieces, strict=True))


class Residual(Aggregation):
    """The differences of neighbouring teachers, ``FIRST-SECOND``, as target sets of their own."""

    def __init__(self, teachers: Mapping[str, TeacherShape], weight: float):
        width = one_width(teachers, "heads.residual")
        names = tuple(teachers)
        self.pairs = {f"{a}-{b}": (a, b) for a, b in pairwise(names)}
        layers = len(teachers[names[0]].targets)
        self.specs = {pair: TargetSpec(layers, (width,)) for pair in self.pairs}
        self.weight = weight

    def __call__(self, teachers: Targets, weights: Weights) -> dict[str, Tensor]:
        return {pair: teachers[a] - teachers[b] for pair, (a, b) in self.pairs.items()}

    def set_weights(self, weights: Weights) -> dict[str, float]:
        return dict.fromkeys(self.specs, self.weight)


class Combined(Aggregation):
    """Several aggregations side by side: the target sets of all of them."""

    def __init__(self, members: Sequence[Aggregation]):
        self.members = tuple(members)
        self.specs = {name: spec for member in members for name, spec in member.specs.items()}

    def __call__(self, teachers: Targets, weights: Weights) -> dict[str, Tensor]:
        return {k: v for member in self.members for k, v in member(teachers, weights).items()}

    def set_weights(self, weights: Weights) -> dict[str, float]:
        return {k: v for member in self.members for k, v in member.set_weights(weights).items()}

    def dim_weights(self, weights: Weights) -> dict[str, Tensor]:
        return {k: v for member in self.members for k, v in member.dim_weights(weights).items()}

    def per_teacher(self, predictions: Targets) -> dict[str, Tensor]:
        # A later member's part counts: build_aggregation puts a teacher's own heads behind its
        # share in an aggregate.
        return {k: v for member in self.members for k, v in member.per_teacher(predictions).items()}


AGGREGATIONS: dict[str, type[PerTeacher] | type[Average] | type[Concat]] = {
    "separate": PerTeacher,
    "average": Average,
    "concat": Concat,
}


def build_aggregation(
    settings: DistillSettings, teachers: Mapping[str, TeacherShape]
) -> Aggregation:
    """Build the aggregation of an experiment.

    Raises:
        TeacherError: the teachers' widths do not allow it.
    """
    kind = AGGREGATIONS["average" if settings.targets.across_teachers else settings.aggregation]
    members: list[Aggregation] = [kind(teachers)]
    if settings.heads.per_teacher and kind is not PerTeacher:
        members.append(PerTeacher(teachers))
    if settings.heads.residual:
        members.append(Residual(teachers, settings.heads.residual_weight))
    return members[0] if len(members) == 1 else Combined(members)


def one_width(teachers: Mapping[str, TeacherShape], setting: str) -> int:
    """The width that all teachers share.

    Raises:
        TeacherError: they have several; ``setting`` is the one that needs a single width.
    """
    widths = {name: teacher.width for name, teacher in teachers.items()}
    if len(set(widths.values())) > 1:
        shown = ", ".join(f"{name} has {width}" for name, width in widths.items())
        raise TeacherError(
            f"{setting} needs teachers of one width ({shown}); use aggregation: separate or concat"
        )
    return next(iter(widths.values()))


def crop_frames(targets: Targets) -> dict[str, Tensor]:
    """Cut all of ``[batch, layer, frame, dim]`` to the fewest frames among them.

    Upstreams of one stride may differ by a frame at the end (they pad differently).

    Raises:
        TeacherError: the counts differ by more than two frames: not the same stride.
    """
    frames = {name: states.shape[2] for name, states in targets.items()}
    fewest = min(frames.values())
    if max(frames.values()) - fewest > 2:
        shown = ", ".join(f"{name}: {count}" for name, count in frames.items())
        raise TeacherError(f"the teachers' frames do not match ({shown}); use one frame rate")
    return {name: states[:, :, :fewest] for name, states in targets.items()}
