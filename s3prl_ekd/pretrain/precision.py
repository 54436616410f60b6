"""The number format of the student's forward."""

from __future__ import annotations

import logging

import torch

from .settings import RunSettings

logger = logging.getLogger(__name__)


def halves(run: RunSettings, device: str) -> bool:
    """Whether float16 and a loss scale are used: ``fp16``, on a CUDA device."""
    return run.fp16 and device.startswith("cuda")


def autocast(run: RunSettings, device: str) -> torch.autocast:
    """The context of the student's forward: float16, bfloat16, or nothing.

    On a CPU it is nothing: bfloat16 is slower there than float32, and some (virtual) processors
    claim instructions for it that they do not have.
    """
    on_cuda = device.startswith("cuda")
    for name in ("fp16", "bf16"):
        if getattr(run, name) and not on_cuda:
            logger.warning("runner.%s needs a CUDA device: training in float32", name)
    dtype = torch.bfloat16 if run.bf16 else torch.float16
    return torch.autocast("cuda", dtype, enabled=on_cuda and (run.bf16 or run.fp16))
