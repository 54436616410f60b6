"""The frames of the extractor: 400 samples each, one every 320."""

from __future__ import annotations

WINDOW, HOP = 400, 320  # samples


def frame_count(samples: int) -> int:
    """Frames that seven convolutions of HuBERT's strides give for ``samples``."""
    return max(0, (samples - WINDOW) // HOP + 1)


def sample_count(frames: int) -> int:
    """The fewest samples that give so many frames."""
    return (frames - 1) * HOP + WINDOW
