"""Pad a pruned student to layers of one size, as transformers needs; its outputs do not change.

Each layer gets all heads of the copied teacher and as many feed-forward units as the widest layer.
What is added has zero weights: a head with zero columns in ``out_proj``, or a unit with zero
columns in ``fc2``, adds nothing to the output.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..distill.student import Student
from ..distill.student_settings import PrunedSettings

_COLUMNS = ("out_proj.weight", "fc2.weight")


def padded_settings(settings: PrunedSettings) -> PrunedSettings:
    """The settings of the padded student; its feed-forward networks have at least one unit."""
    all_heads = tuple(range(settings.encoder_attention_heads))
    units = max(1, *settings.ffn_dims)
    return dataclasses.replace(
        settings,
        heads=(all_heads,) * settings.encoder_layers,
        ffn_dims=(units,) * settings.encoder_layers,
    )


@torch.no_grad()
def padded(student: Student) -> Student:
    """A padded copy of a pruned student without gates, in eval mode.

    Heads keep their places, because WavLM's position bias and its gate belong to a place. The
    position gates of layers without heads, which no output depends on, become zero.
    """
    settings = student.settings
    assert isinstance(settings, PrunedSettings) and student.is_cut
    result = Student(padded_settings(settings)).eval()
    weights = student.backbone.state_dict()
    for name, value in result.backbone.state_dict().items():
        own = weights.get(name)
        if own is not None and own.shape == value.shape:
            value.copy_(own)
            continue
        value.zero_()
        if own is not None:
            value.index_copy_(int(name.endswith(_COLUMNS)), _kept(name, settings), own.to(value))
    return result


def _kept(name: str, settings: PrunedSettings) -> Tensor:
    """Which rows or columns of a padded tensor are those of the pruned one."""
    layer = int(name.split(".")[2])  # encoder.layers.LAYER.
    if ".fc" in name:
        return torch.arange(settings.ffn_dims[layer])
    width = torch.arange(settings.head_dim)
    return torch.cat([place * settings.head_dim + width for place in settings.heads[layer]])
