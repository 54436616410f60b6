"""Students with random weights, in the variants that the exports support."""

from __future__ import annotations

from typing import Literal

import torch

from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import Architecture, GateSettings, PrunedSettings

# Name -> changed settings.
VARIANTS = {
    "default": {},
    "norm first": {"layer_norm_first": True, "activation_fn": "relu"},
    "layer norm": {"extractor_mode": "layer_norm", "conv_pos": 15, "encoder_layers": 1},
    "no projection": {"extractor_conv_feature_layers": "[(48,10,5)] + [(48,3,2)] * 4"},
}


def random_student(settings: Architecture, seed: int = 0) -> Student:
    """A student whose norms are not the identity, as in a trained one."""
    torch.manual_seed(seed)
    student = Student(settings).eval()
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm)):
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
    return student


def pruned_student(
    seed: int = 0,
    *,
    wavlm: bool = False,
    layer_norm_first: bool = False,
    extractor_mode: Literal["default", "layer_norm"] = "default",
    normalize: bool = False,
    feature_scale: bool = False,
    gates: GateSettings | None = None,
) -> Student:
    """A copied student in eval mode with layers of unequal widths: one has no heads, another no
    feed-forward units. Biases, norms, scales and position gates are random."""
    settings = PrunedSettings(
        conv_layers=tuple(
            (channels, kernel, stride)
            for channels, (kernel, stride) in zip(
                (20, 13, 24, 17, 9, 22, 19),
                ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)),
                strict=True,
            )
        ),
        extractor_mode=extractor_mode,
        conv_bias=extractor_mode == "layer_norm",  # as in published models
        normalize_waveforms=normalize,
        encoder_embed_dim=48,
        encoder_attention_heads=4,
        heads=((0, 2), (), (1, 2, 3)),
        ffn_dims=(40, 17, 0),
        conv_pos=16,
        conv_pos_groups=4,
        activation_fn="gelu",
        layer_norm_first=layer_norm_first,
        position_buckets=32 if wavlm else 0,
        max_distance=60 if wavlm else 0,
        feature_scale=feature_scale,
        gates=gates,
    )
    student = random_student(settings, seed)
    with torch.no_grad():
        for name, value in student.named_parameters():
            if name.endswith((".bias", ".grep_a", ".relative_attention_bias.weight")):
                value.normal_(float(name.endswith(".grep_a")), 0.3)
            elif name.endswith(".scale.weight"):
                value.uniform_(0.5, 1)
    return student
