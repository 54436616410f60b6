"""The PHI-S transform (Ranzinger et al. 2024, arXiv 2410.01680, section 3)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .moments import ROUNDING


def phi_s(covariance: Tensor, mean: Tensor | None = None) -> Tensor:
    """The PHI-S transform ``[target, dim, dim]``, by which centred rows are multiplied from the
    right: a rotation to the principal axes, a Hadamard matrix that spreads the variance evenly over
    all dimensions, and a division by the mean deviation.

    Args:
        covariance: ``[target, dim, dim]``.
        mean: ``[target, dim]``; targets whose deviation is below the rounding error of their mean
            are not scaled.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    variance = values.clamp(min=0).mean(-1)
    least = torch.full_like(variance, 1e-12)
    if mean is not None:
        least = least.maximum((ROUNDING * mean.double()).square().mean(-1))
    scale = torch.where(variance > least, variance.rsqrt(), 1.0)
    mix = hadamard(covariance.shape[-1])
    assert mix is not None  # TargetNorm has checked the width
    transform: Tensor = scale[:, None, None] * vectors @ mix.to(vectors).T
    return transform.float()


@functools.cache
def hadamard(size: int) -> Tensor | None:
    """An orthogonal matrix ``[size, size]`` with entries ± size^(-1/2); None if not implemented.

    Built by Sylvester's doubling from the orders 1, 12 and 20 (Paley's construction): among others
    96, 768 and 1024.
    """
    for matrix in (torch.ones(1, 1), _paley(11), _paley(19)):
        factor, rest = divmod(size, len(matrix))
        if rest == 0 and factor & (factor - 1) == 0:
            while len(matrix) < size:
                matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
            return matrix / math.sqrt(size)
    return None


def _paley(prime: int) -> Tensor:
    """Paley's first construction, for a prime of the form 4k + 3: order ``prime + 1``."""
    index = torch.arange(prime)
    sign = torch.full((prime,), -1.0)
    sign[index.square() % prime] = 1.0  # of 0 and of the squares modulo the prime
    matrix = torch.ones(prime + 1, prime + 1)
    matrix[1:, 0] = -1.0
    matrix[1:, 1:] = sign[(index[:, None] - index) % prime]
    return matrix
