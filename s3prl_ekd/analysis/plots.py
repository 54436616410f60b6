"""Heat maps and dendrograms of layer similarities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..files.atomic import atomic_file
from ..system.figures import new_figure


def plot_similarity(matrix: np.ndarray, layers: Mapping[str, int], path: Path) -> None:
    """Draw ``[layer, layer]`` similarities, 0 to 1, of all teachers' layers as a heat map (PNG).

    Args:
        layers: teacher -> its number of layers, in the order of the matrix.
    """
    size = 2.5 + 0.16 * len(matrix)
    figure = new_figure(size + 1, size)
    axis = figure.subplots()
    image = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, ax=axis, label="linear CKA", shrink=0.8)
    numbers = [str(layer) for count in layers.values() for layer in range(count)]
    axis.set_xticks(range(len(numbers)), numbers, fontsize=6)
    axis.set_yticks(range(len(numbers)), numbers, fontsize=6)
    start = 0
    for name, count in layers.items():
        middle = (start + (count - 1) / 2, 1.01)
        style = {"ha": "center", "va": "bottom", "fontsize": 8}
        axis.annotate(name, middle, xycoords=("data", "axes fraction"), **style)
        start += count
        if start < len(matrix):
            axis.axhline(start - 0.5, color="white")
            axis.axvline(start - 0.5, color="white")
    axis.set(xlabel="layer", ylabel="layer, teachers in the same order")
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120, format="png")


def plot_trees(
    trees: Mapping[str, np.ndarray], groups: Mapping[str, Sequence], ylabel: str, path: Path
) -> None:
    """Draw a dendrogram for each teacher, coloured by its groups (PNG).

    Args:
        trees: teacher -> scipy's linkage matrix over the layers 1 to N.
        groups: teacher -> its groups; a dashed line shows where the tree is cut into them.
        ylabel: label of the height.
    """
    from scipy.cluster.hierarchy import dendrogram

    figure = new_figure(4.2 * len(trees), 3.2)
    axes = figure.subplots(1, len(trees), squeeze=False)[0]
    for axis, (name, tree) in zip(axes, trees.items(), strict=True):
        merges = len(tree) - (len(groups[name]) - 1)  # merges below the cut
        heights = [0.0, *tree[:, 2], 1.1 * max(tree[:, 2].max(), 1e-6)]
        cut = (heights[merges] + heights[merges + 1]) / 2
        labels = [str(layer) for layer in range(1, len(tree) + 2)]
        dendrogram(tree, ax=axis, labels=labels, color_threshold=cut)
        axis.axhline(cut, color="gray", linestyle="--", linewidth=0.8)
        title = " | ".join(" ".join(map(str, group)) for group in groups[name])
        axis.set_title(f"{name}: {title}", fontsize=9)
        axis.set(xlabel="layer", ylabel=ylabel)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120, format="png")
