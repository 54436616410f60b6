"""Compare an exported model with the student it was made from, on waveforms of noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError


def noise_waves(*counts: int) -> list[Tensor]:
    """Waveforms ``[sample]`` of noise with the given numbers of samples; fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(count, generator=generator) for count in counts]


def largest_difference(
    expected: Sequence[Tensor],
    states: Sequence[Tensor],
    tolerance: float,
    subject: str,
    advice: str = "",
) -> float:
    """The largest absolute difference between two lists of hidden states.

    Args:
        expected: of the student.
        states: of the exported model.
        tolerance: largest allowed difference; relative to a state's largest value if that is
            above 1.
        subject: the exported model, for the message.
        advice: appended to the message.

    Raises:
        CheckpointError: a difference is above the tolerance, or shapes differ.
    """
    shapes, expected_shapes = [[list(s.shape) for s in group] for group in (states, expected)]
    if shapes != expected_shapes:
        raise CheckpointError(
            f"{subject} has hidden states of shapes {shapes}, the student {expected_shapes}; "
            f"nothing is written{advice}"
        )
    worst = 0.0
    for reference, state in zip(expected, states, strict=True):
        error = (reference - state).abs().max().item()
        if not error <= tolerance * max(1.0, reference.abs().max().item()):
            raise CheckpointError(
                f"{subject} differs from the student by {error:.1e} (at most {tolerance:.0e} is "
                f"allowed); nothing is written{advice}"
            )
        worst = max(worst, error)
    return worst
