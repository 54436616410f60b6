"""Numbers of frames in a batch or in a step: the denominators of the terms of the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class FrameCounts(NamedTuple):
    """Numbers of frames, summed over utterances.

    ``frames``: valid frames outside masked spans. ``masked``: those in masked spans, for the unit
    loss. ``pairs``: pairs of valid frames outside masked spans in the same window, for the relation
    loss; a pair of a frame with itself counts too. ``padded``: frames of padding, if the
    distillation loss includes them (``loss.mask_padding: false``), else 0.
    """

    frames: float = 0.0
    masked: float = 0.0
    pairs: float = 0.0
    padded: float = 0.0

    @property
    def distilled(self) -> float:
        """The frames in the distillation loss."""
        return self.frames + self.padded

    @property
    def valid(self) -> float:
        """All valid frames."""
        return self.frames + self.masked

    def plus(self, other: FrameCounts) -> FrameCounts:
        return FrameCounts(*(a + b for a, b in zip(self, other, strict=True)))

    def divided_by(self, divisor: float) -> FrameCounts:
        return FrameCounts(*(count / divisor for count in self))


def count_frames(
    valid: Tensor, spans: Tensor | None, window: int, mask_padding: bool = True
) -> FrameCounts:
    """Count the frames of a batch.

    Args:
        valid: ``[batch, frame]``, 1 where a frame is valid.
        spans: bool ``[batch, frame]``, the frames in masked spans; None: there are none.
        window: frames of a window of the relation loss.
        mask_padding: whether the distillation loss leaves out padding.
    """
    outside = valid.double() if spans is None else valid.double() * ~spans
    by_window = split_windows(outside[..., None], window).sum((2, 3))  # [batch, window]
    masked = 0.0 if spans is None else float((valid * spans).sum())
    padded = 0.0 if mask_padding else valid.numel() - float(valid.sum())
    return FrameCounts(float(outside.sum()), masked, float(by_window.square().sum()), padded)


def divide(total: Tensor, count: Tensor | float) -> Tensor:
    """``total / count``; 0, with gradients of 0, if the count is 0."""
    if isinstance(count, Tensor):
        return total / torch.where(count > 0, count, 1)
    return total / count if count > 0 else total * 0


def split_windows(frames: Tensor, window: int) -> Tensor:
    """``[..., frame, dim]`` -> ``[..., window, frame of the window, dim]``; the last window is
    padded with zeros. An utterance of fewer frames than ``window`` has one window of its length."""
    count = frames.shape[-2]
    window = max(1, min(window, count))
    padded: Tensor = F.pad(frames, (0, 0, 0, -count % window))
    return padded.unflatten(-2, (-1, window))  # type: ignore[no-any-return]
