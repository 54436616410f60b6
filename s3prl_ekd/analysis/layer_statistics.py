"""Statistics of a layer's frames."""

from __future__ import annotations

from torch import Tensor


def layer_statistics(frames: Tensor) -> tuple[float, float, float]:
    """The mean L2 norm of frames ``[frame, dim]``, and mean and deviation of all values."""
    frames = frames.double()
    norm = frames.norm(dim=-1).mean().item()
    return norm, frames.mean().item(), frames.std(correction=0).item()
