"""Statistics of a layer's frames."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """``norm``: mean L2 norm of a frame; ``mean`` and ``std``: over all values."""

    norm: float
    mean: float
    std: float


def layer_statistics(frames: Tensor) -> LayerStatistics:
    """Statistics of a layer's frames ``[frame, dim]``, computed in float64."""
    frames = frames.double()
    return LayerStatistics(
        frames.norm(dim=-1).mean().item(),
        frames.mean().item(),
        frames.std(correction=0).item(),
    )
