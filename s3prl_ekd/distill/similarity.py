"""How alike two sets of frames are: linear CKA and the mean cosine.

Linear CKA (Kornblith et al. 2019, arXiv 1905.00414, eq. 2 with linear kernels) does not change when
the features of either set are rotated or scaled, so layers of different teachers and widths can be
compared. Unrelated sets give about dim / frames and not 0: take several times as many frames as
dimensions. It is computed between features, ``||Y'X||² / (||X'X|| ||Y'Y||)`` over centred frames:
the memory goes with the square of the widths and not of the number of frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

_TINY = 1e-12  # relative to the frames' power: below it a set of frames is constant


class LinearCKA:
    """Linear CKA between two sets of frames that come in batches.

    Sums are kept in float64. Feed it with :meth:`update`, read :meth:`value` at any time.
    """

    def __init__(self):
        self.count = 0
        self._sums: list[Tensor] | None = None  # of x and y
        self._products: list[Tensor] | None = None  # x'x, y'y, x'y

    def update(self, x: Tensor, y: Tensor) -> LinearCKA:
        """Add frames: ``[frame, dim x]`` and ``[frame, dim y]``, frame by frame of one sound.

        Raises:
            ValueError: the two have different numbers of frames.
        """
        if len(x) != len(y):
            raise ValueError(f"{len(x)} frames and {len(y)} frames cannot be compared")
        x, y = x.detach().double(), y.detach().double()
        sums, products = [x.sum(0), y.sum(0)], [x.T @ x, y.T @ y, x.T @ y]
        if self._sums is not None:
            sums = [old + new for old, new in zip(self._sums, sums, strict=True)]
            products = [old + new for old, new in zip(self._products, products, strict=True)]
        self._sums, self._products = sums, products
        self.count += len(x)
        return self

    def value(self) -> float:
        """CKA over all frames so far, 0 to 1; NaN where a set does not vary (or is empty)."""
        if not self.count:
            return float("nan")
        x, y = self._sums
        norms = []
        for product, a, b in zip(self._products, (x, y, x), (x, y, y), strict=True):
            norms.append((product - torch.outer(a, b) / self.count).norm())
        for own, product in zip(norms[:2], self._products[:2], strict=True):
            if own <= _TINY * product.norm():
                return float("nan")
        return (norms[2] ** 2 / (norms[0] * norms[1])).item()


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of ``[frame, dim x]`` and ``[frame, dim y]``: 0 to 1, NaN where one is constant.

    Example:
        >>> frames = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]])
        >>> round(linear_cka(frames, 5 * frames.flip(1)), 6)
        1.0
    """
    return LinearCKA().update(x, y).value()


def frame_cosine(x: Tensor, y: Tensor) -> float:
    """Mean over frames of the cosine between ``x`` and ``y``, both ``[frame, dim]``: -1 to 1.

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"cosine needs sets of one shape, not {list(x.shape)} and {list(y.shape)}")
    return F.cosine_similarity(x.double(), y.double(), dim=-1).mean().item()


def cka_matrix(layers: Sequence[Tensor]) -> Tensor:
    """Linear CKA between all pairs of ``layers``, ``[frame, dim]`` each -> ``[layer, layer]``.

    The same as :func:`linear_cka` pair by pair, with each layer centred and measured once; the
    products are float32, which is enough once all layers are of one scale.
    """
    centred = []
    for layer in layers:
        layer = layer.double()
        rest = layer - layer.mean(0)
        constant = rest.norm() <= 1e-6 * layer.norm()
        rest = (rest / rest.norm()).float()
        # scaled to norm(x'x) = 1, and NaN where there is nothing to compare
        centred.append(rest * float("nan") if constant else rest / (rest.T @ rest).norm().sqrt())
    count = len(layers)
    matrix = torch.ones(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i, count):
            matrix[i, j] = matrix[j, i] = (centred[i].T @ centred[j]).norm() ** 2
    return matrix


def cosine_matrix(layers: Sequence[Tensor]) -> Tensor:
    """:func:`frame_cosine` between all pairs of ``layers`` -> ``[layer, layer]``."""
    units = torch.stack([F.normalize(layer.double(), dim=-1) for layer in layers])
    return torch.einsum("ifd,jfd->ij", units, units) / units.shape[1]


SIMILARITIES = {"cka": cka_matrix, "cosine": cosine_matrix}


def similarity_matrix(layers: Sequence[Tensor], measure: str) -> Tensor:
    """``[layer, layer]`` by a measure of :data:`SIMILARITIES`.

    Raises:
        ConfigError: there is no such measure.
    """
    if measure not in SIMILARITIES:
        raise ConfigError(
            f"similarity {measure!r} is not known; use one of: {', '.join(SIMILARITIES)}"
        )
    return SIMILARITIES[measure](layers)
