"""What the frames of a cache hold, and which part of it a run wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """``targets`` vectors of ``dim`` numbers in each frame, of a teacher or a target set."""

    name: str
    targets: int
    dim: int


Layout = tuple[Block, ...]  # side by side in a frame, in this order


def columns(layout: Layout) -> int:
    """Numbers in a frame."""
    return sum(block.targets * block.dim for block in layout)


def pieces(layout: Layout) -> int:
    """Vectors in a frame, each of which has a scale where the numbers are int8."""
    return sum(block.targets for block in layout)


def joined(targets: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """``{name: [1, target, frame, dim]}`` of one utterance as ``[frame, column]``."""
    flat = [targets[block.name][0].transpose(0, 1).flatten(1) for block in layout]
    return torch.cat(flat, dim=1)


def parted(values: Tensor, scales: Tensor | None, layout: Layout) -> dict[str, Tensor]:
    """``[batch, frame, column]`` as ``{name: [batch, target, frame, dim]}`` in float32.

    Args:
        values: as stored.
        scales: ``[batch, piece]`` to multiply each vector with, or None.
        layout: of the columns.
    """
    batch, frames = values.shape[:2]
    targets, column, piece = {}, 0, 0
    for name, count, dim in layout:
        part = values[..., column : column + count * dim].view(batch, frames, count, dim)
        part = part.transpose(1, 2).float()  # [batch, target, frame, dim]
        if scales is not None:
            part = part * scales[:, piece : piece + count, None, None]
        targets[name] = part
        column, piece = column + count * dim, piece + count
    return targets


class Part(NamedTuple):
    """The share of a cache that a run reads: its ``layout``, the ``spans`` of columns ``(from,
    to)`` that it is made of, and the numbers of its ``pieces``."""

    layout: Layout
    spans: tuple[tuple[int, int], ...]
    pieces: tuple[int, ...]


def part_of(layout: Layout, wanted: Mapping[str, Sequence[int]]) -> Part:
    """Choose blocks, and of each some targets by their numbers, in the order of ``wanted``."""
    starts, column, piece = {}, 0, 0
    for block in layout:
        starts[block.name] = block, column, piece
        column, piece = column + block.targets * block.dim, piece + block.targets
    chosen, spans, numbers = [], [], []
    for name, targets in wanted.items():
        block, column, piece = starts[name]
        chosen.append(Block(name, len(targets), block.dim))
        for target in targets:
            begin = column + target * block.dim
            if spans and spans[-1][1] == begin:
                spans[-1] = spans[-1][0], begin + block.dim
            else:
                spans.append((begin, begin + block.dim))
            numbers.append(piece + target)
    return Part(tuple(chosen), tuple(spans), tuple(numbers))
