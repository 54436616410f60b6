"""The models of a benchmark: true architectures, random weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..distill.settings import StudentSettings
from ..files.atomic import save_whole

_CONV = "[({0},10,5)] + [({0},3,2)] * 4 + [({0},2,2)] * 2"
_LARGE = {
    "extractor_mode": "layer_norm",
    "layer_norm_first": True,
    "conv_bias": False,
    "normalize": True,
}


@dataclass(frozen=True)
class Size:
    """Three teachers, two of HuBERT's kind and a WavLM, and a student of two layers.

    ``layers`` are the teachers' targets; ``more`` what is set beside the widths.
    """

    channels: int
    width: int
    ffn: int
    heads: int
    depth: int
    layers: tuple[int, ...]
    conv_pos: int
    conv_pos_groups: int
    student: StudentSettings
    more: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """What HuBERT's and WavLM's configs have in common."""
        return {
            "conv_feature_layers": _CONV.format(self.channels),
            "encoder_embed_dim": self.width,
            "encoder_ffn_embed_dim": self.ffn,
            "encoder_attention_heads": self.heads,
            "encoder_layers": self.depth,
            "conv_pos": self.conv_pos,
            "conv_pos_groups": self.conv_pos_groups,
            **self.more,
        }


SIZES = {
    # That of `s3prl-ekd demo`.
    "tiny": Size(
        64, 96, 192, 4, 6, (2, 4, 6), 32, 4,
        StudentSettings(
            extractor_conv_feature_layers=_CONV.format(64),
            encoder_embed_dim=96,
            encoder_ffn_embed_dim=192,
            encoder_attention_heads=4,
            conv_pos=32,
            conv_pos_groups=4,
        ),
    ),
    # HuBERT Base and WavLM Base+, 94 M parameters each.
    "base": Size(512, 768, 3072, 12, 12, (4, 8, 12), 128, 16, StudentSettings()),
    # HuBERT Large and WavLM Large, 315 M parameters each.
    "large": Size(512, 1024, 4096, 16, 24, (8, 16, 24), 128, 16, StudentSettings(), _LARGE),
}  # fmt: skip
TEACHERS = ("hubert", "robust_hubert", "wavlm")


def write_teachers(folder: Path, size: Size) -> dict[str, Path]:
    """Write the three checkpoints in s3prl's formats: teacher name -> file."""
    paths = {}
    for seed, name in enumerate(TEACHERS):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = _wavlm(size) if name == "wavlm" else _hubert(size)
        paths[name] = folder / f"{name}.pt"
        save_whole(state, os.fspath(paths[name]))
    return paths


def _hubert(size: Size) -> dict[str, Any]:
    from s3prl.upstream.hubert.hubert_model import (
        HubertConfig,
        HubertModel,
        HubertPretrainingConfig,
    )

    model = {"label_rate": 50.0, **size.config()}
    task = {"label_rate": 50.0, "normalize": model.pop("normalize", False)}
    symbols = [["0", "1"]]
    made = HubertModel(HubertConfig(**model), HubertPretrainingConfig(**task), symbols)
    return {
        "task_cfg": task,
        "model_cfg": model,
        "model_weight": made.state_dict(),
        "dictionaries_symbols": symbols,
    }


def _wavlm(size: Size) -> dict[str, Any]:
    from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

    config = {
        **size.config(),
        "relative_position_embedding": True,
        "num_buckets": 320,
        "max_distance": 800,
        "gru_rel_pos": True,
    }
    return {"cfg": config, "model": WavLM(WavLMConfig(config)).state_dict()}
