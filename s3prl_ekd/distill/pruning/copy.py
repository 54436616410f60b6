"""Copy a teacher into a student with the same architecture."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import TeacherError
from ..conv_layers import DEFAULT, parse_conv_layers
from ..student import Student
from ..student_settings import CopySettings, PrunedSettings, PruningSettings, check_size

# Parameters of teachers on which no hidden state depends, and those of masking and pretraining.
_UNUSED = re.compile(
    r"mask_emb$|final_proj\.|label_embs_concat$|quantizer\.|project_q\.|target_glu\."
)
_SHAPES = [layer[1:] for layer in parse_conv_layers(DEFAULT)]  # kernel and stride of each layer


def copy_teacher(
    model: nn.Module, normalize: bool, copy: CopySettings, pruning: PruningSettings | None
) -> Student:
    """Build a student with the architecture and the weights of a teacher.

    Args:
        model: the teacher's own model, in fairseq's layout.
        normalize: whether the teacher normalises waveforms.
        copy: dropout of the student.
        pruning: adds gates; None: no gates.

    Raises:
        TeacherError: the model is not a HuBERT, wav2vec 2.0 or WavLM with wav2vec 2.0's frame rate.
    """
    where = f"student.of: {copy.of}"
    weights = {k: v for k, v in model.state_dict().items() if not _UNUSED.match(k)}
    try:
        settings = _settings(model, weights, normalize, copy, pruning)
        check_size(settings)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        problem = str(error).strip().splitlines()[0]
    else:
        student = Student(settings, start_drop=pruning.start_drop if pruning else None)
        problem = _load(student, weights)
    if problem:
        raise TeacherError(
            f"{where}: the teacher does not have the layout of HuBERT, wav2vec 2.0 or WavLM "
            f"({problem}); copy another teacher, or use student.kind: distil"
        )
    return student


def _settings(
    model: Any,
    weights: dict[str, Tensor],
    normalize: bool,
    copy: CopySettings,
    pruning: PruningSettings | None,
) -> PrunedSettings:
    blocks, encoder = model.feature_extractor.conv_layers, model.encoder
    convs = [block[0] for block in blocks]
    layers = tuple((c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs)
    if [layer[1:] for layer in layers] != _SHAPES:
        raise ValueError(f"kernels and strides of its conv layers are {[x[1:] for x in layers]}")
    attention = encoder.layers[0].self_attn
    buckets = weights.get("encoder.layers.0.self_attn.relative_attention_bias.weight")
    activation = encoder.layers[0].activation_fn.__name__
    if activation not in ("gelu", "relu"):
        raise ValueError(f"its activation is {activation}")
    positions = encoder.pos_conv[0]
    layer_norm = isinstance(blocks[0][2], nn.Sequential)
    return PrunedSettings(
        conv_layers=layers,
        extractor_mode="layer_norm" if layer_norm else "default",
        conv_bias=convs[0].bias is not None,
        normalize_waveforms=normalize,
        encoder_embed_dim=positions.out_channels,
        encoder_attention_heads=attention.num_heads,
        heads=(tuple(range(attention.num_heads)),) * len(encoder.layers),
        ffn_dims=tuple(layer.fc1.out_features for layer in encoder.layers),
        conv_pos=positions.kernel_size[0],
        conv_pos_groups=positions.groups,
        activation_fn=activation,
        layer_norm_first=encoder.layer_norm_first,
        position_buckets=0 if buckets is None else len(buckets),
        max_distance=0 if buckets is None else attention.max_distance,
        feature_scale=pruning is not None
        and pruning.last_conv == "soft"
        and "conv" in pruning.units,
        gates=None if pruning is None else pruning.gates,
        masked_norm=copy.masked_norm and not layer_norm,
        feature_grad_mult=copy.feature_grad_mult if copy.train_extractor else 0.0,
        dropout=copy.dropout,
        attention_dropout=copy.attention_dropout,
        activation_dropout=copy.activation_dropout,
        input_dropout=copy.input_dropout,
    )


@torch.no_grad()
def _load(student: Student, weights: dict[str, Tensor]) -> str:
    """Copy the weights; return what does not fit, or an empty text."""
    own = {
        name: value
        for name, value in student.backbone.state_dict().items()
        if not name.endswith((".log_alpha", ".scale.weight"))
    }
    if "post_extract_proj.weight" not in weights:  # the conv features are as wide as the layers
        width = student.width
        weights = {**weights, "post_extract_proj.weight": torch.eye(width)}
        weights["post_extract_proj.bias"] = torch.zeros(width)
    if unmatched := sorted(own.keys() ^ weights.keys()):
        name = unmatched[0]
        return f"{name} is only in the {'teacher' if name in weights else 'student'}"
    for name, value in own.items():
        if value.shape != weights[name].shape:
            return f"{name} has the shape {[*weights[name].shape]}, not {[*value.shape]}"
    student.backbone.load_state_dict(weights, strict=False)
    return ""
