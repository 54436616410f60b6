"""What s3prl's experts do to waveforms before the model, for one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_EPS = 1e-5  # of torch's layer_norm, by which s3prl normalises a waveform


def normalised(waves: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each waveform brought to zero mean and unit variance over its valid samples.

    Args:
        waves: ``[batch, sample]``, 0 behind the end of each.
        lengths: valid samples of each.
    """
    count = torch.tensor(lengths, device=waves.device, dtype=waves.dtype)[:, None]
    valid = torch.arange(waves.shape[1], device=waves.device) < count  # [batch, sample]
    centred = (waves - waves.sum(1, keepdim=True) / count) * valid
    variance = centred.square().sum(1, keepdim=True) / count
    return centred * torch.rsqrt(variance + _EPS)


def padded_frames(
    lengths: Sequence[int],
    samples: int,
    frames: int,
    conv: Sequence[tuple[int, int]] | None,
) -> list[int] | None:
    """How many frames of each utterance are valid, or None where nothing is padded.

    Args:
        lengths: valid samples of each.
        samples, frames: of the padded batch.
        conv: kernel and stride of each conv layer, for wav2vec 2.0, which counts the frames that a
            waveform of this length gives; None for HuBERT and WavLM, which cut the samples into as
            many equal blocks as there are frames and keep a block with any sound.
    """
    if all(length == samples for length in lengths):
        return None
    if conv is None:
        block = samples // frames
        return [min(-(-length // block), frames) for length in lengths]
    counts = []
    for length in lengths:
        for kernel, stride in conv:
            length = (length - kernel) // stride + 1
        # s3prl marks the last valid frame by its index: of none at all it marks the very last.
        counts.append(length if length > 0 else frames)
    return counts
