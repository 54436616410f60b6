"""Masked spans of the student's conv features, for masked prediction of units.

HuBERT's rule (Hsu et al. 2021, arXiv 2106.07447, section III-B; wav2vec 2.0, arXiv 2006.11477,
section 3.1): frames are drawn at random as starts of spans of a fixed length, and spans may
overlap. A learned vector replaces the masked frames. Ours: the spans of an utterance depend on
seed, epoch and utterance only, not on the rest of the batch. (HuBERT's code unmasks frames until
all utterances of a batch have as many masked ones.)
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .student_settings import ConvInput, MaskSettings


@dataclass(frozen=True)
class SpanMask:
    """Draws the masked frames of utterances.

    ``conv``: gives the number of frames for a number of samples.
    """

    settings: MaskSettings
    conv: ConvInput

    def draw(self, samples: int, generator: random.Random) -> Tensor:
        """Draw the masked frames of an utterance: bool ``[frame]``."""
        return draw_spans(self.conv.frames(samples), self.settings, generator)


def draw_spans(frames: int, settings: MaskSettings, generator: random.Random) -> Tensor:
    """Draw masked spans: bool ``[frame]``, true where a frame is masked.

    The number of spans is ``share * frames / length``, rounded up or down at random so that its
    mean is exact, but at least two (HuBERT), and at most the number of starts. Starts are distinct,
    and every span lies within the utterance. An utterance that is shorter than a span is not
    masked.
    """
    masked = torch.zeros(max(0, frames), dtype=torch.bool)
    starts = frames - settings.length + 1
    count = max(2, int(settings.share * frames / settings.length + generator.random()))
    for start in generator.sample(range(max(0, starts)), max(0, min(count, starts))):
        masked[start : start + settings.length] = True
    return masked


class MaskEmbedding(nn.Module):
    """The learned vector that replaces masked frames; drawn uniformly from 0 to 1, as in HuBERT.

    It is used in training only, so it is not part of the student.
    """

    def __init__(self, width: int):
        super().__init__()
        self.vector = nn.Parameter(torch.rand(width))
