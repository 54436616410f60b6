"""MFCC with first and second differences, clustered in the first iteration (HuBERT, section 4.1).

Frames of 25 ms every 10 ms, of which every second one is kept: it covers exactly the samples of the
extractor's frame with the same index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s3prl_ekd import compat

from .frames import frame_count

DIM = 39


def mfcc(wave: Tensor) -> Tensor:
    """Compute MFCC: ``[sample]`` (16 kHz, 400 or more) -> ``[frame, 39]``, a frame every 320."""
    compat.apply()
    from torchaudio.compliance import kaldi
    from torchaudio.functional import compute_deltas

    cepstra = kaldi.mfcc(wave[None], sample_frequency=16_000, use_energy=False)  # [10 ms, 13]
    first = compute_deltas(cepstra.T)  # [13, 10 ms]
    features = torch.cat([cepstra.T, first, compute_deltas(first)])
    frames = features.T[::2]
    assert frames.shape == (frame_count(len(wave)), DIM)
    return frames.contiguous()
