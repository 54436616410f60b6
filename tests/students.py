"""Students with random weights, in the variants that the exports support."""

from __future__ import annotations

import torch

from s3prl_ekd.distill.student import Student
from s3prl_ekd.distill.student_settings import StudentSettings

# Name -> changed settings.
VARIANTS = {
    "default": {},
    "norm first": {"layer_norm_first": True, "activation_fn": "relu"},
    "layer norm": {"extractor_mode": "layer_norm", "conv_pos": 15, "encoder_layers": 1},
    "no projection": {"extractor_conv_feature_layers": "[(48,10,5)] + [(48,3,2)] * 4"},
}


def random_student(settings: StudentSettings, seed: int = 0) -> Student:
    """A student whose norms are not the identity, as in a trained one."""
    torch.manual_seed(seed)
    student = Student(settings).eval()
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm)):
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
    return student
