"""Frames of the conv extractor: 400 samples each, one every 320."""

from __future__ import annotations

WINDOW, HOP = 400, 320  # samples


def frame_count(samples: int) -> int:
    """Number of frames that seven convolutions with HuBERT's strides give for ``samples``."""
    return max(0, (samples - WINDOW) // HOP + 1)


def sample_count(frames: int) -> int:
    """Smallest number of samples that gives ``frames`` frames."""
    return (frames - 1) * HOP + WINDOW
