"""Layer similarity, and groups of layers by hierarchical clustering (SKILL, arXiv 2402.16830).

Paper: the groups come from hierarchical clustering of layer similarities. Ours, as we found no more
in the paper's text: linear CKA as the similarity, 1 - similarity as the distance, average linkage,
and the number of groups with the highest silhouette, which counts groups of one layer as 0 (the
measurements behind this are in ``docs/method.md``). ``contiguous`` (ours) merges only neighbouring
layers.

A tree is scipy's linkage matrix ``[layer - 1, 4]``: the two merged clusters, their distance, and
the number of layers in the merged cluster.

Linear CKA (Kornblith et al. 2019, arXiv 1905.00414, eq. 2 with linear kernels) is invariant to
rotation and scaling of the features, so it can compare layers of different teachers and widths.
Unrelated layers have a CKA of about dim / frames, not 0: use several times more frames than
dimensions. It is computed between features as ``||Y'X||² / (||X'X|| ||Y'Y||)`` over centred frames,
so memory grows with the square of the widths, not of the number of frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    """Cluster layers hierarchically; returns the tree as scipy's linkage matrix.

    Args:
        similarity: ``[layer, layer]``, symmetric, at most 1.
        linkage: one of :data:`LINKAGES`. ``ward`` treats the distances as Euclidean.
        contiguous: merge only neighbouring layers or groups.

    Raises:
        ConfigError: fewer than two layers, or a similarity is NaN (a constant layer).
    """
    distance = layer_distances(similarity)
    if contiguous:
        return _neighbour_tree(distance, linkage)
    hierarchy, squareform = require_scipy()
    return hierarchy.linkage(squareform(distance, checks=False), method=linkage)


def layer_distances(similarity: np.ndarray) -> np.ndarray:
    """1 - similarity, ``[layer, layer]``: symmetric, 0 or more, 0 on the diagonal.

    Raises:
        ConfigError: fewer than two layers, or a similarity is NaN (a constant layer).
    """
    similarity = np.asarray(similarity, dtype=float)
    if len(similarity) < 2:
        raise ConfigError(f"expected at least two layers to group, got {len(similarity)}")
    if not np.isfinite(similarity).all():
        raise ConfigError("cannot group layers that are constant over the sample")
    distance = np.clip(1 - (similarity + similarity.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    return distance


def cut_tree(tree: np.ndarray, groups: int) -> Groups:
    """Cut a tree into ``groups`` sorted groups of the layers 1 to N, ordered by their first layer.

    The last merges are undone, so there are exactly ``groups`` groups, also with ties. Raises
    ConfigError if there are fewer layers than groups.
    """
    count = len(tree) + 1
    if not 1 <= groups <= count:
        raise ConfigError(f"expected 1 to {count} groups of {count} layers, got {groups}")
    members: dict[int, tuple[int, ...]] = {i: (i + 1,) for i in range(count)}
    for step, (left, right, *_) in enumerate(tree[: count - groups]):
        members[count + step] = members.pop(int(left)) + members.pop(int(right))
    return tuple(sorted(tuple(sorted(group)) for group in members.values()))


def silhouette(distance: np.ndarray, groups: Groups) -> float:
    """The mean silhouette of the layers (Rousseeuw 1987), -1 to 1; high for clear groups.

    Of a layer with mean distance a from the other layers of its group, and b from the nearest other
    group, it is (b - a) / max(a, b); of a layer alone in its group, 0.

    Args:
        distance: ``[layer, layer]``, see :func:`layer_distances`.
        groups: of the layers 1 to N.

    Returns:
        NaN for a single group, which has no other to compare with.
    """
    if len(groups) < 2:
        return math.nan
    members = [np.array(group) - 1 for group in groups]
    values = []
    for own in members:
        for layer in own:
            if len(own) == 1:
                values.append(0.0)
                continue
            a = distance[layer, own].sum() / (len(own) - 1)
            b = min(distance[layer, other].mean() for other in members if other is not own)
            values.append((b - a) / max(a, b) if max(a, b) > 0 else 0.0)
    return float(np.mean(values))


@dataclass(frozen=True)
class Cut:
    """One number of groups of a tree."""

    groups: Groups

    silhouette: float
    """See :func:`silhouette`."""

    gap: float
    """Rise of the merge distance if there were one group fewer."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Layers of each group."""
        return tuple(map(len, self.groups))


def cuts(tree: np.ndarray, distance: np.ndarray) -> list[Cut]:
    """The cuts of a tree into 1 to N groups of its N layers."""
    count = len(tree) + 1
    heights = [0.0, *tree[:, 2], math.nan]  # heights[n]: distance of the n-th merge
    result = []
    for number in range(1, count + 1):
        groups, merges = cut_tree(tree, number), count - number
        gap = heights[merges + 1] - heights[merges]
        result.append(Cut(groups, silhouette(distance, groups), gap))
    return result


def best_cut(options: Sequence[Cut]) -> Cut:
    """The cut with the highest silhouette, into 2 to N - 1 groups of N layers; ties: fewer groups.

    Two layers give two groups.
    """
    return max(options[1:-1] or options[1:], key=lambda cut: cut.silhouette)


def _neighbour_tree(distance: np.ndarray, linkage: str) -> np.ndarray:
    """Agglomerative clustering that merges only neighbours, nearest first; ties: the earlier pair.

    As in scipy, distances to a merged cluster follow Lance and Williams (1967). A merge can have a
    smaller distance than the merge before it. Its height is then raised to that of the merge
    before, so that the tree can be drawn; this changes no group.
    """
    count = len(distance)
    distance = distance.copy()
    order = list(range(count))  # row of `distance` of each cluster, from first to last layer
    labels, sizes = list(range(count)), [1] * count
    tree, height = [], 0.0
    for step in range(count - 1):
        gaps = [distance[a, b] for a, b in zip(order, order[1:], strict=False)]
        nearest = int(np.argmin(gaps))
        i, j = order[nearest], order[nearest + 1]
        height = max(height, gaps[nearest])
        tree.append([*sorted((labels[i], labels[j])), height, sizes[i] + sizes[j]])
        for k in order:
            if k not in (i, j):
                merged = _merged_distance(linkage, distance, i, j, k, sizes)
                distance[i, k] = distance[k, i] = merged
        labels[i], sizes[i] = count + step, sizes[i] + sizes[j]
        del order[nearest + 1]
    return np.array(tree, dtype=float).reshape(-1, 4)


def _merged_distance(
    linkage: str, d: np.ndarray, i: int, j: int, k: int, sizes: Sequence[int]
) -> float:
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
    """Import scipy's ``hierarchy`` and ``squareform``. Raises SetupError if it is not installed."""
    try:
        from scipy.cluster import hierarchy
        from scipy.spatial.distance import squareform
    except ImportError:
        raise SetupError(
            "clustering layers needs scipy; type: pip install scipy matplotlib"
        ) from None
    return hierarchy, squareform


def cka_matrix(layers: Sequence[Tensor]) -> Tensor:
    """Linear CKA of all pairs of ``layers``, ``[frame, dim]`` each -> ``[layer, layer]``, 0 to 1.

    NaN for a constant layer. Each layer is centred and scaled once in float64; the products are
    float32, which is precise enough for layers of one scale.
    """
    centred = []
    for layer in layers:
        layer = layer.double()
        x = layer - layer.mean(0)
        constant = x.norm() <= 1e-6 * layer.norm()
        x = (x / x.norm()).float()
        # scaled to norm(x'x) = 1
        centred.append(x * float("nan") if constant else x / (x.T @ x).norm().sqrt())
    count = len(layers)
    matrix = torch.ones(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i, count):
            matrix[i, j] = matrix[j, i] = (centred[i].T @ centred[j]).norm() ** 2
    return matrix


def cosine_matrix(layers: Sequence[Tensor]) -> Tensor:
    """Cosine of all pairs of ``layers``, averaged over frames; all layers must have one width.

    ``[frame, dim]`` each -> ``[layer, layer]``, -1 to 1.
    """
    units = torch.stack([F.normalize(layer.double(), dim=-1) for layer in layers])
    return torch.einsum("ifd,jfd->ij", units, units) / units.shape[1]


SIMILARITIES = {"cka": cka_matrix, "cosine": cosine_matrix}
