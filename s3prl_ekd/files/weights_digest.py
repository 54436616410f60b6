"""Digest of a model's weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from .safetensors_file import raw_bytes


def weights_digest(module: nn.Module) -> str:
    """Digest of all parameters and buffers: names, shapes, dtypes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
