"""Export a trained model in s3prl's format, in float16."""

from __future__ import annotations

from pathlib import Path

import torch

from s3prl_ekd.errors import CheckpointError
from s3prl_ekd.files.atomic import atomic_torch_save

from .models import MaskedPredictor

LIMIT = 7_000_000  # bytes


def export(model: MaskedPredictor, path: Path) -> int:
    """Write a checkpoint that s3prl's ``hubert_local`` or ``wavlm_local`` loads (into float32).

    HuBERT's class has a head, which is exported too; WavLM's has none.

    Returns:
        The size of the file in bytes.

    Raises:
        CheckpointError: a weight does not fit into float16, or the file would exceed 7 MB.
    """
    weights = {
        name: tensor.detach().cpu().half() for name, tensor in model.backbone.state_dict().items()
    }
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"cannot write {path}: {name} does not fit into float16")
    key = "model_weight" if model.family == "hubert" else "model"
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(tensor.numel() for tensor in weights.values()) * 2
    if size > LIMIT:
        raise CheckpointError(
            f"cannot write {path}: it must have {LIMIT:,} bytes or less, got {size:,}"
        )
    atomic_torch_save({**model.checkpoint, key: weights}, path)
    return path.stat().st_size
