"""How the chosen layers of several teachers become the student's targets.

Every aggregation turns ``{teacher: hidden [batch, layer, frame, dim]}`` into
``{target set: target [batch, layer, frame, width]}``; the student has one set of prediction heads
for each target set. The rest of the code does not know which aggregation it is.

``separate`` is the paper's multiple-prediction-head method, ``average`` and ``concat`` are its
layerwise-average and layerwise-concatenation (arXiv 2302.12757, abstract). That concatenated
targets are predicted by one wide head is *ours*: the paper's text does not settle it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TeacherError


@dataclass(frozen=True)
class TeacherShape:
    """What a teacher gives: the layers asked of it and the width of its hidden states."""

    layers: tuple[int, ...]
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


def crop_frames(hidden: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
        self.specs = {name: TargetSpec(len(t.layers), (t.width,)) for name, t in teachers.items()}

    def targets(self, hidden: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(hidden)

    def per_teacher(self, predictions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of the predictions that answers to each teacher."""
        return dict(predictions)


class Average:
    """Layerwise average: one target set, the mean of the teachers' layers."""

    def __init__(self, teachers: Mapping[str, TeacherShape]):
        self.teachers = tuple(teachers)
        widths = {name: teacher.width for name, teacher in teachers.items()}
        if len(set(widths.values())) > 1:
            shown = ", ".join(f"{name} has {width}" for name, width in widths.items())
            raise TeacherError(
                f"aggregation average needs teachers of one width ({shown}); "
                "use aggregation: separate or concat"
            )
        first = next(iter(teachers.values()))
        self.specs = {"average": TargetSpec(len(first.layers), (first.width,))}

    def targets(self, hidden: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"average": torch.stack([hidden[name] for name in self.teachers]).mean(0)}

    def per_teacher(self, predictions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: predictions["average"] for name in self.teachers}


class Concat:
    """Layerwise concatenation: one target set, the teachers' layers side by side."""

    def __init__(self, teachers: Mapping[str, TeacherShape]):
        self.teachers = tuple(teachers)
        first = next(iter(teachers.values()))
        widths = tuple(teacher.width for teacher in teachers.values())
        self.specs = {"concat": TargetSpec(len(first.layers), widths)}

    def targets(self, hidden: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"concat": torch.cat([hidden[name] for name in self.teachers], dim=-1)}

    def per_teacher(self, predictions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pieces = predictions["concat"].split(self.specs["concat"].parts, dim=-1)
        return dict(zip(self.teachers, pieces, strict=True))


AGGREGATIONS = {"separate": Separate, "average": Average, "concat": Concat}
