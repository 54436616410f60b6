"""What the first iteration clusters: MFCC with first and second differences (HuBERT, section 4.1).

A frame of 25 ms every 10 ms; every second one is kept, and that is exactly the samples which the
extractor's frame of the same number sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s3prl_ekd import compat

from .frames import frame_count

DIM = 39


def mfcc(wave: Tensor) -> Tensor:
    """``[sample]`` at 16 kHz, at least 400 of them -> ``[frame, 39]``, one frame every 320."""
    compat.apply()
    from torchaudio.compliance import kaldi
    from torchaudio.functional import compute_deltas

    cepstra = kaldi.mfcc(wave[None], sample_frequency=16_000, use_energy=False)  # [10 ms, 13]
    first = compute_deltas(cepstra.T)  # [13, 10 ms]
    both = torch.cat([cepstra.T, first, compute_deltas(first)])
    frames = both.T[::2]
    assert frames.shape == (frame_count(len(wave)), DIM)
    return frames.contiguous()
