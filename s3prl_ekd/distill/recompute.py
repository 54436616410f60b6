"""Activation checkpointing: compute the student's activations again in the backward pass."""

from __future__ import annotations

import functools

from torch.utils.checkpoint import checkpoint

from .student import Student


def recompute(student: Student) -> None:
    """Keep only what goes into each conv block and each transformer layer, from now on.

    Most of a small student's memory is the conv extractor's activations. What is kept is a fraction
    of them; the student's forward is computed twice. Loss and gradients are the same, dropout too.
    """
    backbone = student.backbone
    for block in (*backbone.feature_extractor.conv_layers, *backbone.encoder.layers):
        block.forward = functools.partial(_forward, block.forward)


def _forward(forward, *args, **kwargs):
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
