"""The prediction heads: a module of their own, so dropping them is deleting one object."""

from __future__ import annotations

from collections.abc import Mapping

from s3prl.upstream.distiller.module import SplitLinear
from torch import Tensor, nn

from .aggregation import TargetSpec


class SplitHead(nn.Module):
    """Predict all layers of one target set from the student's last hidden state.

    s3prl's distiller head (DistilHuBERT, arXiv 2110.01900, section 2): one linear layer to
    ``layers`` x ``width of the student``, GELU, then a linear layer for each target layer.

    Args:
        in_width: width of the student's hidden state.
        layers: number of target layers.
        out_width: width of the targets.
    """

    def __init__(self, in_width: int, layers: int, out_width: int):
        super().__init__()
        self.layers = layers
        self.net = nn.Sequential(
            nn.Linear(in_width, in_width * layers),
            nn.GELU(),
            SplitLinear(in_width, layers, out_width),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """``[batch, frame, in_width]`` -> ``[batch, layer, frame, out_width]``."""
        batch, frame, _ = hidden.shape
        flat = self.net(hidden)  # [batch, frame, layer * out_width]
        return flat.reshape(batch, frame, self.layers, -1).transpose(1, 2)


class LinearHead(SplitHead):
    """One linear layer for each target layer and nothing else (*ours*); arguments as above."""

    def __init__(self, in_width: int, layers: int, out_width: int):
        nn.Module.__init__(self)
        self.layers = layers
        self.net = nn.Linear(in_width, layers * out_width)


HEADS = {"split": SplitHead, "linear": LinearHead}


class PredictionHeads(nn.ModuleDict):
    """One head for each target set, by its name; ``kind`` is ``split`` or ``linear``."""

    def __init__(self, in_width: int, specs: Mapping[str, TargetSpec], kind: str = "split"):
        super().__init__(
            {name: HEADS[kind](in_width, spec.layers, spec.width) for name, spec in specs.items()}
        )
        self.kind = kind

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        """``[batch, frame, dim]`` -> ``{target set: [batch, layer, frame, width]}``."""
        return {name: head(hidden) for name, head in self.items()}
