"""Aggregation of the chosen layers of several teachers into the student's targets.

An aggregation maps ``{teacher: targets [batch, layer, frame, dim]}`` to
``{target set: targets [batch, layer, frame, width]}``. The student has one prediction head for each
target set, and the rest of the code is the same for every aggregation.

``separate`` is the paper's method of multiple prediction heads, ``average`` and ``concat`` are its
layerwise average and layerwise concatenation (arXiv 2302.12757, abstract). Predicting concatenated
targets by one wide head is *ours*: the abstract does not say how they are predicted. "Layer" is a
target of a teacher: one of its layers or, with ``teachers.NAME.groups`` (SKILL, arXiv 2402.16830),
the average of several.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import TeacherError
from .settings import DistillSettings

Targets = Mapping[str, Tensor]  # teacher or target set -> [batch, layer, frame, dim]
Weights = Mapping[str, float]  # teacher -> its share


@dataclass(frozen=True)
class TeacherShape:
    """Shape of a teacher's targets: the layers averaged for each target, and their width."""

    targets: tuple[tuple[int, ...], ...]
    width: int


@dataclass(frozen=True)
class TargetSpec:
    """Shape of a target set: its number of layers, and the widths of its parts along the feature
    axis: one for each teacher in ``concat``, and a single one in other target sets.

    ``members``: the layers of each target; empty if the teachers' layers differ.
    """

    layers: int
    parts: tuple[int, ...]
    members: tuple[tuple[int, ...], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        lowest = min((min(target, default=-1) for target in self.members), default=0)
        if self.members and (len(self.members) != self.layers or lowest < 0):
            raise ValueError(f"members must have layers of 0 or more for each of {self.layers}")

    @property
    def width(self) -> int:
        return sum(self.parts)


class Aggregation(ABC):
    """Base class: maps the teachers' targets to target sets.

    Attributes:
        specs: target set -> its shape.
    """

    specs: dict[str, TargetSpec]

    @abstractmethod
    def __call__(self, teachers: Targets, weights: Weights) -> dict[str, Tensor]:
        """``{teacher: [batch, layer, frame, dim]}`` -> ``{target set: [..., width]}``."""

    def set_weights(self, weights: Weights) -> dict[str, float]:
        """Target set -> its weight in the loss."""
        return dict.fromkeys(self.specs, 1.0)

    def dim_weights(self, weights: Weights) -> dict[str, Tensor]:
        """Target set -> weights ``[width]``, for target sets with unequal weights of dimensions."""
        return {}

    def per_teacher(self, predictions: Targets) -> dict[str, Tensor]:
        """Teacher -> the part of the predictions that estimates its targets, ``[batch, layer,
        frame, dim]``; teachers without such a part are omitted."""
        return {}


class PerTeacher(Aggregation):
    """One target set for each teacher: multiple prediction heads."""

    def __init__(self, teachers: Mapping[str, TeacherShape]):
        self.specs = {
            name: TargetSpec(len(teacher.targets), (teacher.width,), teacher.targets)
            for name, teacher in teachers.items()
        }

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
        members = common_targets(teachers)
        self.specs = {"average": TargetSpec(len(first.targets), (width,), members)}

    def __call__(self, teachers: Targets, weights: Weights) -> dict[str, Tensor]:
        total = sum(weights[name] for name in self.teachers)
        first, *rest = (teachers[name] * (weights[name] / total) for name in self.teachers)
        return {"average": sum(rest, first)}

    def per_teacher(self, predictions: Targets) -> dict[str, Tensor]:
        return {name: predictions["average"] for name in self.teachers}


class Concat(Aggregation):
    """Layerwise concatenation: one target set, the teachers' layers side by side."""

    def __init__(self, teachers: Mapping[str, TeacherShape]):
        self.teachers = tuple(teachers)
        first = next(iter(teachers.values()))
        widths = tuple(teacher.width for teacher in teachers.values())
        self.specs = {"concat": TargetSpec(len(first.targets), widths, common_targets(teachers))}

    def __call__(self, teachers: Targets, weights: Weights) -> dict[str, Tensor]:
        return {"concat": torch.cat([teachers[name] for name in self.teachers], dim=-1)}

    def dim_weights(self, weights: Weights) -> dict[str, Tensor]:
        """Weights ``[width]``: a teacher's sum is in proportion to its weight, at any width."""
        parts = self.specs["concat"].parts
        shares = [
            weights[name] * max(parts) / n for name, n in zip(self.teachers, parts, strict=True)
        ]
        if len(set(shares)) == 1:
            return {}
        pieces = [torch.full((n,), share) for n, share in zip(parts, shares, strict=True)]
        return {"concat": torch.cat(pieces)}

    def per_teacher(self, predictions: Targets) -> dict[str, Tensor]:
        pieces = torch.split(predictions["concat"], list(self.specs["concat"].parts), dim=-1)
        return dict(zip(self.teachers, pieces, strict=True))


class Residual(Aggregation):
    """Differences between each teacher and the next: target sets ``FIRST-SECOND``."""

    def __init__(self, teachers: Mapping[str, TeacherShape], weight: float):
        width = one_width(teachers, "heads.residual")
        self.pairs = {f"{a}-{b}": (a, b) for a, b in pairwise(teachers)}
        layers = len(next(iter(teachers.values())).targets)
        members = common_targets(teachers)
        self.specs = {pair: TargetSpec(layers, (width,), members) for pair in self.pairs}
        self.weight = weight

    def __call__(self, teachers: Targets, weights: Weights) -> dict[str, Tensor]:
        return {pair: teachers[a] - teachers[b] for pair, (a, b) in self.pairs.items()}

    def set_weights(self, weights: Weights) -> dict[str, float]:
        return dict.fromkeys(self.specs, self.weight)


class CombinedAggregation(Aggregation):
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
        # Later members override earlier ones: a teacher's own heads come after the aggregate's.
        return {k: v for member in self.members for k, v in member.per_teacher(predictions).items()}


AGGREGATIONS: dict[str, type[PerTeacher] | type[Average] | type[Concat]] = {
    "separate": PerTeacher,
    "average": Average,
    "concat": Concat,
}


def build_aggregation(
    settings: DistillSettings, teachers: Mapping[str, TeacherShape]
) -> Aggregation:
    """Build the aggregation of an experiment. Raises TeacherError if the widths do not allow it."""
    kind = AGGREGATIONS["average" if settings.targets.across_teachers else settings.aggregation]
    members: list[Aggregation] = [kind(teachers)]
    if settings.heads.per_teacher and kind is not PerTeacher:
        members.append(PerTeacher(teachers))
    if settings.heads.residual:
        members.append(Residual(teachers, settings.heads.residual_weight))
    return members[0] if len(members) == 1 else CombinedAggregation(members)


def common_targets(teachers: Mapping[str, TeacherShape]) -> tuple[tuple[int, ...], ...]:
    """The layers of each target, if they are the same for all teachers; else an empty tuple."""
    first, *rest = (teacher.targets for teacher in teachers.values())
    return first if all(targets == first for targets in rest) else ()


def one_width(
    teachers: Mapping[str, TeacherShape],
    setting: str,
    instead: str = "aggregation: separate or concat",
) -> int:
    """The width that all teachers have. Raises TeacherError, naming ``setting``, if they differ."""
    widths = {name: teacher.width for name, teacher in teachers.items()}
    if len(set(widths.values())) > 1:
        shown = ", ".join(f"{name} has {width}" for name, width in widths.items())
        raise TeacherError(f"{setting} needs teachers of equal width ({shown}); use {instead}")
    return next(iter(widths.values()))


def crop_frames(targets: Targets) -> dict[str, Tensor]:
    """Crop ``[batch, layer, frame, dim]`` of all teachers to the smallest number of frames.

    Upstreams of equal stride may differ by a frame or two at the end, because they pad differently;
    a larger difference raises TeacherError.
    """
    frames = {name: states.shape[2] for name, states in targets.items()}
    fewest = min(frames.values())
    if max(frames.values()) - fewest > 2:
        shown = ", ".join(f"{name}: {count}" for name, count in frames.items())
        raise TeacherError(
            f"the teachers give different numbers of frames ({shown}); use one frame rate"
        )
    return {name: states[:, :, :fewest] for name, states in targets.items()}


def describe_targets(specs: Mapping[str, TargetSpec]) -> str:
    """Target sets as text: ``hubert (4 layers of 768)``."""
    return ", ".join(
        f"{name} ({spec.layers} layers of {spec.width})" for name, spec in specs.items()
    )
