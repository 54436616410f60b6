"""Students with gates and random weights, in the layouts of HuBERT and WavLM, Base and Large."""

from __future__ import annotations

import torch
from torch import nn

from s3prl_ekd.distill.pruning.gates import Gate
from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import GateSettings, PrunedSettings

ALL_UNITS = ("conv", "heads", "ffn", "attention", "feed_forward")
WAVLM = {"position_buckets": 32, "max_distance": 80}
LARGE = {"extractor_mode": "layer_norm", "conv_bias": True, "layer_norm_first": True}
SOFT = {"feature_scale": True}  # with last_conv: soft
# Name -> changed settings.
LAYOUTS = {
    "hubert": {},
    "hubert_large": {**LARGE, "normalize_waveforms": True},
    "wavlm": WAVLM,
    "wavlm_large": {**WAVLM, **LARGE, "conv_pos": 15},
    "soft": SOFT,
    "soft_large": {**SOFT, **LARGE, "activation_fn": "relu"},
}


def gated_settings(units=("conv", "heads", "ffn"), norms="kept", **changes) -> PrunedSettings:
    """A tiny student with gates for ``units``: 7 conv layers, 3 layers of width 24 with 3 heads."""
    last_conv = "soft" if changes.get("feature_scale") else "hard"
    sizes = {
        "conv_layers": ((12, 10, 5), *[(10, 3, 2)] * 4, (8, 2, 2), (14, 2, 2)),
        "extractor_mode": "default",
        "conv_bias": False,
        "normalize_waveforms": False,
        "encoder_embed_dim": 24,
        "encoder_attention_heads": 3,
        "heads": ((0, 1, 2),) * 3,
        "ffn_dims": (20,) * 3,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "activation_fn": "gelu",
        "layer_norm_first": False,
        "gates": GateSettings(units, last_conv, norms) if units else None,
    }
    return PrunedSettings(**{**sizes, **changes})


def gated_student(settings: PrunedSettings, seed: int = 0) -> Student:
    """A student in eval mode whose biases, norms and gates all differ from their first values."""
    torch.manual_seed(seed)
    student = Student(settings).eval()
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.weight.normal_(1, 0.3)
            if isinstance(module, Gate):
                module.log_alpha.normal_(0, 3)
        for name, parameter in student.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif name.endswith("grep_a"):
                parameter.normal_(1, 0.3)
    return student


def saturate(student: Student, closed: dict[str, float] | None = None, seed: int = 0) -> None:
    """Set every gate to certainly open or certainly closed, at random.

    Args:
        closed: share of closed gates by kind of unit, instead of a half; at least one conv channel
            stays open.
    """
    generator = torch.Generator().manual_seed(seed)
    for unit, _, gate in student.backbone.gates():
        share = (closed or {}).get(unit, 0.5)
        is_closed = torch.rand(len(gate.log_alpha), generator=generator) < share
        if unit == "conv":
            is_closed[-1] = False
        gate.log_alpha.data = torch.where(is_closed, -200.0, 200.0)


def noise(*lengths: int, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise ``[batch, sample]``, zero behind an utterance's length, and the lengths ``[batch]``."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lengths)
    waves = 0.1 * torch.randn(len(lengths), max(lengths), generator=generator)
    return waves * (torch.arange(max(lengths)) < counts[:, None]), counts
