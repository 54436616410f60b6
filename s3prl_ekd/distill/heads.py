"""The prediction heads. They are separate from the student, so an export can leave them out."""

from __future__ import annotations

from collections.abc import Mapping

from s3prl.upstream.distiller.module import SplitLinear
from torch import Tensor, nn

from .aggregation import TargetSpec


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


HEADS: dict[str, type[SplitHead] | type[LinearHead]] = {"split": SplitHead, "linear": LinearHead}


class PredictionHeads(nn.ModuleDict):
    """One head for each target set, by its name; ``kind``: ``split`` or ``linear``."""

    def __init__(self, in_width: int, specs: Mapping[str, TargetSpec], kind: str = "split"):
        super().__init__(
            {name: HEADS[kind](in_width, spec.layers, spec.width) for name, spec in specs.items()}
        )
        self.kind = kind

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        """``[batch, frame, dim]`` -> ``{target set: [batch, layer, frame, width]}``."""
        return {name: head(hidden) for name, head in self.items()}
