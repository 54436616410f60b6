"""How the chosen layers of several teachers become the student's targets.

Every aggregation turns ``{teacher: hidden [batch, layer, frame, dim]}`` into
``{target set: target [batch, layer, frame, width]}``; the student has one set of prediction heads
for each target set. The rest of the code does not know which aggregation it is.

``separate`` is the paper's multiple-prediction-head method, ``average`` and ``concat`` are its
layerwise-average and layerwise-concatenation (arXiv 2302.12757, abstract). That concatenated
targets are predicted by one wide head is *ours*: the paper's text does not settle it. "Layer"
stands for a target of a teacher: with SKILL's groups it is the average of several layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import TeacherError
from .settings import TargetSettings

Hidden = Mapping[str, Tensor]  # teacher or target set -> [batch, layer, frame, dim]
Weights = Mapping[str, float]  # teacher -> its share


@dataclass(frozen=True)
class TeacherShape:
    """What a teacher gives: the layers behind each of its targets, and their width."""

    targets: tuple[tuple[int, ...], ...]
    width: int


@dataclass(frozen=True)
class TargetSpec:
    """One target set: how many layers and how wide, and whose dimensions follow on each other.

    ``parts`` are the widths of the pieces along the feature axis, by teacher: one piece for
    ``separate`` and ``average``, one a teacher for ``concat``.
    """

    layers: int
    parts: tuple[int, ...]

    @property
    def width(self) -> int:
        return sum(self.parts)


def crop_frames(hidden: Hidden) -> dict[str, Tensor]:
    """Cut all of ``[batch, layer, frame, dim]`` to the fewest frames among them.

    Upstreams of one stride may differ by a frame at the end (they pad differently).

    Raises:
        TeacherError: the counts differ by more than two frames: not the same stride.
    """
    frames = {name: states.shape[2] for name, states in hidden.items()}
    fewest = min(frames.values())
    if max(frames.values()) - fewest > 2:
        shown = ", ".join(f"{name}: {count}" for name, count in frames.items())
        raise TeacherError(f"the teachers' frames do not match ({shown}); use one frame rate")
    return {name: states[:, :, :fewest] for name, states in hidden.items()}


class Separate:
    """Each teacher is a target set of its own: multiple prediction heads."""

    def __init__(self, teachers: Mapping[str, TeacherShape]):
        self.specs = {n: TargetSpec(len(t.targets), (t.width,)) for n, t in teachers.items()}

    def targets(self, hidden: Hidden, weights: Weights) -> dict[str, Tensor]:
        return {name: hidden[name] for name in self.specs}

    def set_weights(self, weights: Weights) -> dict[str, float]:
        """The share of each target set in the loss."""
        return {name: weights[name] for name in self.specs}

    def dim_weights(self, weights: Weights) -> dict[str, Tensor]:
        """For target sets whose dimensions do not weigh the same: ``[dim]``."""
        return {}

    def per_teacher(self, predictions: Hidden) -> dict[str, Tensor]:
        """The part of the predictions that answers to each teacher."""
        return {name: predictions[name] for name in self.specs}


class Average(Separate):
    """Layerwise average: one target set, the weighted mean of the teachers' layers."""

    def __init__(self, teachers: Mapping[str, TeacherShape]):
        self.teachers = tuple(teachers)
        width = one_width(teachers, "aggregation average")
        first = next(iter(teachers.values()))
        self.specs = {"average": TargetSpec(len(first.targets), (width,))}

    def targets(self, hidden: Hidden, weights: Weights) -> dict[str, Tensor]:
        total = sum(weights[name] for name in self.teachers)
        mean = sum(hidden[name] * (weights[name] / total) for name in self.teachers)
        return {"average": mean}

    def set_weights(self, weights: Weights) -> dict[str, float]:
        return {"average": 1.0}

    def per_teacher(self, predictions: Hidden) -> dict[str, Tensor]:
        return {name: predictions["average"] for name in self.teachers}


class Concat(Separate):
    """Layerwise concatenation: one target set, the teachers' layers side by side."""

    def __init__(self, teachers: Mapping[str, TeacherShape]):
        self.teachers = tuple(teachers)
        first = next(iter(teachers.values()))
        widths = tuple(teacher.width for teacher in teachers.values())
        self.specs = {"concat": TargetSpec(len(first.targets), widths)}

    def targets(self, hidden: Hidden, weights: Weights) -> dict[str, Tensor]:
        return {"concat": torch.cat([hidden[name] for name in self.teachers], dim=-1)}

    def set_weights(self, weights: Weights) -> dict[str, float]:
        return {"concat": 1.0}

    def dim_weights(self, weights: Weights) -> dict[str, Tensor]:
        if len({weights[name] for name in self.teachers}) == 1:
            return {}
        pieces = zip(self.teachers, self.specs["concat"].parts, strict=True)
        return {"concat": torch.cat([torch.full((n,), weights[name]) for name, n in pieces])}

    def per_teacher(self, predictions: Hidden) -> dict[str, Tensor]:
        pieces = predictions["concat"].split(self.specs["concat"].parts, dim=-1)
        return dict(zip(self.teachers, pieces, strict=True))


class Residual(Separate):
    """The differences of neighbouring teachers, ``FIRST-SECOND``, as target sets of their own."""

    def __init__(self, teachers: Mapping[str, TeacherShape], weight: float):
        width = one_width(teachers, "targets.residual_heads")
        names = tuple(teachers)
        self.pairs = {f"{a}-{b}": (a, b) for a, b in pairwise(names)}
        layers = len(teachers[names[0]].targets)
        self.specs = {pair: TargetSpec(layers, (width,)) for pair in self.pairs}
        self.weight = weight

    def targets(self, hidden: Hidden, weights: Weights) -> dict[str, Tensor]:
        return {pair: hidden[a] - hidden[b] for pair, (a, b) in self.pairs.items()}

    def set_weights(self, weights: Weights) -> dict[str, float]:
        return dict.fromkeys(self.specs, self.weight)


class Combined(Separate):
    """Several aggregations side by side: the target sets of all of them."""

    def __init__(self, members: Sequence[Separate]):
        self.members = tuple(members)
        self.specs = {name: spec for member in members for name, spec in member.specs.items()}

    def targets(self, hidden: Hidden, weights: Weights) -> dict[str, Tensor]:
        return self._merged("targets", hidden, weights)

    def set_weights(self, weights: Weights) -> dict[str, float]:
        return self._merged("set_weights", weights)

    def dim_weights(self, weights: Weights) -> dict[str, Tensor]:
        return self._merged("dim_weights", weights)

    def per_teacher(self, predictions: Hidden) -> dict[str, Tensor]:
        # heads of a teacher's own tell more of it than a share in an aggregate
        own = [member for member in self.members if type(member) is Separate]
        return (own or self.members)[0].per_teacher(predictions)

    def _merged(self, method: str, *args) -> dict:
        parts = (getattr(member, method)(*args) for member in self.members)
        return {name: value for part in parts for name, value in part.items()}


AGGREGATIONS = {"separate": Separate, "average": Average, "concat": Concat, "groups": Separate}


def build_aggregation(
    aggregation: str, teachers: Mapping[str, TeacherShape], settings: TargetSettings
) -> Separate:
    """The aggregation of a configuration.

    Raises:
        TeacherError: the teachers' widths do not allow it.
    """
    kind = "average" if settings.across_teachers else aggregation
    members = [AGGREGATIONS[kind](teachers)]
    if settings.separate_heads and not set(teachers) <= members[0].specs.keys():
        members.append(Separate(teachers))
    if settings.residual_heads:
        members.append(Residual(teachers, settings.residual_weight))
    return members[0] if len(members) == 1 else Combined(members)


def one_width(teachers: Mapping[str, TeacherShape], what: str) -> int:
    """The width that all teachers share.

    Raises:
        TeacherError: they have several; ``what`` is the setting that minds.
    """
    widths = {name: teacher.width for name, teacher in teachers.items()}
    if len(set(widths.values())) > 1:
        shown = ", ".join(f"{name} has {width}" for name, width in widths.items())
        raise TeacherError(
            f"{what} needs teachers of one width ({shown}); use aggregation: separate or concat"
        )
    return next(iter(widths.values()))
