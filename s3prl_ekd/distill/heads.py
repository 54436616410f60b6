"""The prediction heads. They are separate from the student, so an export can leave them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from s3prl.upstream.distiller.module import SplitLinear
from torch import Tensor, nn

from ..errors import TeacherError
from .aggregation import TargetSpec
from .settings import HeadSettings, check_layerwise
from .student_forward import StudentOutput
from .student_settings import Architecture


class Head(nn.Module):
    """Predicts all layers of one target set from the student's last hidden state.

    Args:
        net: ``[batch, frame, in_width]`` -> ``[batch, frame, layers * out_width]``.
        layers: number of target layers.
    """

    def __init__(self, net: nn.Module, layers: int):
        super().__init__()
        self.layers = layers
        self.net = net

    def forward(self, hidden: Tensor) -> Tensor:
        """``[batch, frame, in_width]`` -> ``[batch, layer, frame, out_width]``."""
        batch, frame, _ = hidden.shape
        flat: Tensor = self.net(hidden)
        return flat.reshape(batch, frame, self.layers, -1).transpose(1, 2)


class SplitHead(Head):
    """s3prl's distiller head (DistilHuBERT, arXiv 2110.01900, section 2): one linear layer to
    ``layers`` x ``in_width``, GELU, then a linear layer to ``out_width`` for each target layer."""

    def __init__(self, in_width: int, layers: int, out_width: int):
        net = nn.Sequential(
            nn.Linear(in_width, in_width * layers),
            nn.GELU(),
            SplitLinear(in_width, layers, out_width),
        )
        super().__init__(net, layers)


class LinearHead(Head):
    """One linear layer for each target layer (*ours*)."""

    def __init__(self, in_width: int, layers: int, out_width: int):
        super().__init__(nn.Linear(in_width, layers * out_width), layers)


class LayerwiseHead(nn.Module):
    """Predicts each target from the student's hidden states of the same layer (DPHuBERT, arXiv
    2305.17651), or of the same group of layers (SKILL, arXiv 2402.16830).

    Args:
        in_width: width of the student's hidden states.
        spec: the targets.
        settings: which targets share a linear layer, and how a group of layers is combined.
    """

    def __init__(self, in_width: int, spec: TargetSpec, settings: HeadSettings):
        super().__init__()
        last = settings.of_group == "last"
        # the hidden states whose mean is the input for each target
        self.sources = [(max(target),) if last else target for target in spec.members]
        keys = [_sharing(target, settings) for target in spec.members]
        names = {key: str(i) for i, key in enumerate(dict.fromkeys(keys))}
        self.uses = [names[key] for key in keys]  # the linear layer of each target
        self.projections = nn.ModuleDict(
            {name: identity_linear(in_width, spec.parts) for name in names.values()}
        )

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Hidden states ``[batch, frame, in_width]`` -> ``[batch, layer, frame, out_width]``."""
        predictions = []
        for layers, name in zip(self.sources, self.uses, strict=True):
            hidden = states[layers[0]]
            if len(layers) > 1:
                hidden = torch.stack([states[layer] for layer in layers]).mean(0)
            predictions.append(self.projections[name](hidden))
        return torch.stack(predictions, dim=1)


def _sharing(target: tuple[int, ...], settings: HeadSettings) -> int:
    """Number of the group of targets that share a linear layer with ``target``."""
    if settings.share is None:
        return int(target != (0,))
    for i, group in enumerate(settings.share):
        if set(target) <= set(group):
            return i
    raise ValueError(f"heads.share has no group with the layers {[*target]}")


def identity_linear(in_width: int, parts: tuple[int, ...]) -> nn.Linear:
    """A linear layer to ``parts`` side by side, the identity to each part of width ``in_width``."""
    linear = nn.Linear(in_width, sum(parts))
    with torch.no_grad():
        for weight, bias in zip(linear.weight.split(parts), linear.bias.split(parts), strict=True):
            if len(weight) == in_width:
                weight.copy_(torch.eye(in_width))
                bias.zero_()
    return linear


HEADS: dict[str, type[SplitHead] | type[LinearHead]] = {"split": SplitHead, "linear": LinearHead}


DEFAULTS = HeadSettings()


class PredictionHeads(nn.ModuleDict):
    """One head for each target set, by its name."""

    def __init__(
        self, in_width: int, specs: Mapping[str, TargetSpec], settings: HeadSettings = DEFAULTS
    ):
        super().__init__(
            {
                name: LayerwiseHead(in_width, spec, settings)
                if settings.kind == "layerwise"
                else HEADS[settings.kind](in_width, spec.layers, spec.width)
                for name, spec in specs.items()
            }
        )
        self.settings, self.kind = settings, settings.kind

    @property
    def highest_layer(self) -> int | None:
        """The highest of the student's layers that layer-to-layer heads read; None for others."""
        if self.kind != "layerwise":
            return None
        heads = cast("Iterable[LayerwiseHead]", self.values())
        return max(max(layers) for head in heads for layers in head.sources)

    def forward(self, student: StudentOutput) -> dict[str, Tensor]:
        """The student's output -> ``{target set: [batch, layer, frame, width]}``."""
        layerwise = self.kind == "layerwise"
        source = student.hidden_states if layerwise else student.last
        return {name: head(source) for name, head in self.items()}


def check_layers(specs: Mapping[str, TargetSpec], student: Architecture) -> None:
    """Check that layer-to-layer heads can predict the targets from a student.

    Raises:
        TeacherError: the teachers of a target set have different layers, or the student has fewer
            or skips some at random.
    """
    for name, spec in specs.items():
        if not spec.members:
            raise TeacherError(
                f"heads.kind: layerwise compares equal layers, but the teachers of {name} have "
                "different ones; give all teachers the same layers (or groups), or use "
                "aggregation: separate"
            )
        highest = max(layer for target in spec.members for layer in target)
        try:
            check_layerwise(name, highest, student)
        except ValueError as error:
            raise TeacherError(str(error)) from None
