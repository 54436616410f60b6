"""How alike layers are, and groups of them by hierarchical clustering (SKILL, arXiv 2402.16830).

Paper: the groups come from hierarchical clustering of layer similarity measures. Ours, because the
paper's text at hand does not say: linear CKA as the measure, 1 - similarity as the distance,
average linkage, and a cut at a chosen number of groups. ``contiguous`` (ours) merges neighbouring
layers only.

A tree is scipy's linkage matrix ``[layer - 1, 4]``: the two clusters that merge, the distance at
which they do, and how many layers they hold together.

Linear CKA (Kornblith et al. 2019, arXiv 1905.00414, eq. 2 with linear kernels) does not change when
the features of either set are rotated or scaled, so layers of different teachers and widths can be
compared. Unrelated sets give about dim / frames and not 0: take several times as many frames as
dimensions. It is computed between features, ``||Y'X||² / (||X'X|| ||Y'Y||)`` over centred frames:
the memory goes with the square of the widths and not of the number of frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, SetupError

LINKAGES = ("average", "complete", "single", "ward")
Groups = tuple[tuple[int, ...], ...]


def layer_tree(
    similarity: np.ndarray, linkage: str = "average", contiguous: bool = False
) -> np.ndarray:
    """Cluster layers hierarchically.

    Args:
        similarity: ``[layer, layer]``, symmetric, at most 1.
        linkage: one of :data:`LINKAGES`. ``ward`` takes the distances for Euclidean ones.
        contiguous: only neighbouring layers (or groups of them) may merge.

    Returns:
        The tree, as scipy writes it.

    Raises:
        ConfigError: no such linkage, fewer than two layers, or a similarity that is no number (a
            layer that is constant).
        SetupError: scipy is not installed.
    """
    if linkage not in LINKAGES:
        raise ConfigError(f"linkage {linkage!r} is not known; use one of: {', '.join(LINKAGES)}")
    similarity = np.asarray(similarity, dtype=float)
    if len(similarity) < 2:
        raise ConfigError("a teacher of one layer cannot be grouped")
    if not np.isfinite(similarity).all():
        raise ConfigError("layers that do not vary over the sample cannot be grouped")
    distance = np.clip(1 - (similarity + similarity.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    if contiguous:
        return _neighbour_tree(distance, linkage)
    hierarchy, squareform = require_scipy()
    return hierarchy.linkage(squareform(distance, checks=False), method=linkage)


def cut(tree: np.ndarray, groups: int, layers: Sequence[int] | None = None) -> Groups:
    """Cut a tree into ``groups`` groups of layers, each sorted, in the order of their first layer.

    The merges are undone from the last one, so exactly ``groups`` are left, ties or not.

    Args:
        tree: as :func:`layer_tree` gives it.
        groups: how many.
        layers: the layers' numbers; 1 to N by default.

    Raises:
        ConfigError: fewer layers than groups.
    """
    count = len(tree) + 1
    layers = range(1, count + 1) if layers is None else layers
    if not 1 <= groups <= count:
        raise ConfigError(f"{groups} groups of {count} layers: 1 to {count} groups are possible")
    members: dict[int, tuple[int, ...]] = {i: (number,) for i, number in enumerate(layers)}
    for step, (left, right, *_) in enumerate(tree[: count - groups]):
        members[count + step] = members.pop(int(left)) + members.pop(int(right))
    return tuple(sorted(tuple(sorted(group)) for group in members.values()))


def _neighbour_tree(distance: np.ndarray, linkage: str) -> np.ndarray:
    """Agglomeration in which only neighbours merge, nearest first; the earlier pair wins a tie.

    Distances to a merged cluster follow Lance and Williams (1967), as scipy's do. The nearest
    neighbours can be farther apart than some merged before, so a merge may come below the one
    before it; its height is lifted to that, which keeps the tree drawable and changes no group.
    """
    count = len(distance)
    distance = distance.copy()
    order = list(range(count))  # rows of `distance`, one a cluster, from first layer to last
    names, sizes = list(range(count)), [1] * count
    tree, height = [], 0.0
    for step in range(count - 1):
        gaps = [distance[a, b] for a, b in zip(order, order[1:], strict=False)]
        at = int(np.argmin(gaps))
        i, j = order[at], order[at + 1]
        height = max(height, gaps[at])
        tree.append([*sorted((names[i], names[j])), height, sizes[i] + sizes[j]])
        for k in order:
            if k not in (i, j):
                new = _merged(linkage, distance, i, j, k, sizes)
                distance[i, k] = distance[k, i] = new
        names[i], sizes[i] = count + step, sizes[i] + sizes[j]
        del order[at + 1]
    return np.array(tree, dtype=float).reshape(-1, 4)


def _merged(linkage: str, d: np.ndarray, i: int, j: int, k: int, sizes: Sequence[int]) -> float:
    """The distance from cluster k to the union of i and j."""
    a, b, c = sizes[i], sizes[j], sizes[k]
    if linkage == "single":
        return min(d[i, k], d[j, k])
    if linkage == "complete":
        return max(d[i, k], d[j, k])
    if linkage == "average":
        return (a * d[i, k] + b * d[j, k]) / (a + b)
    square = (a + c) * d[i, k] ** 2 + (b + c) * d[j, k] ** 2 - c * d[i, j] ** 2
    return math.sqrt(max(0.0, square / (a + b + c)))


def require_scipy() -> tuple[Any, Any]:
    """scipy's ``hierarchy`` and ``squareform``. Raises SetupError where it is not installed."""
    try:
        from scipy.cluster import hierarchy
        from scipy.spatial.distance import squareform
    except ImportError:
        raise SetupError(
            "clustering layers needs scipy; type: pip install 's3prl_ekd[analysis]'"
        ) from None
    return hierarchy, squareform


def cka_matrix(layers: Sequence[Tensor]) -> Tensor:
    """Linear CKA between all pairs of ``layers``, ``[frame, dim]`` each -> ``[layer, layer]``.

    0 to 1; NaN for a layer that is constant. Each layer is centred and scaled once; the products
    are float32, which is enough once all layers are of one scale.
    """
    centred = []
    for layer in layers:
        layer = layer.double()
        rest = layer - layer.mean(0)
        constant = rest.norm() <= 1e-6 * layer.norm()
        rest = (rest / rest.norm()).float()
        # scaled to norm(x'x) = 1, and NaN for a constant layer
        centred.append(rest * float("nan") if constant else rest / (rest.T @ rest).norm().sqrt())
    count = len(layers)
    matrix = torch.ones(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i, count):
            matrix[i, j] = matrix[j, i] = (centred[i].T @ centred[j]).norm() ** 2
    return matrix


def cosine_matrix(layers: Sequence[Tensor]) -> Tensor:
    """The mean over frames of the cosine between all pairs of ``layers``, ``[frame, dim]`` each and
    of one width -> ``[layer, layer]``, -1 to 1."""
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
