"""Initialisation of the student from a teacher's weights (inferred: as DistilHuBERT does)."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TeacherError
from .student import Student

logger = logging.getLogger(__name__)

# Parameters of WavLM's attention (gates, relative positions) that the student does not have.
WAVLM_ONLY = re.compile(r"self_attn\.(grep_linear\.|grep_a$|relative_attention_bias\.)")

_INSTEAD = "use another init.teacher, change the student's size, or set init.teacher: null"


def initialise(
    student: Student,
    teachers: Sequence[nn.Module],
    *,
    conv: bool,
    encoder: bool,
    layers: Sequence[int] | None = None,
    same: bool = True,
) -> None:
    """Copy one teacher's weights into the student, or the average of several teachers' weights.

    Args:
        student: changed in place.
        teachers: the teachers' own models (fairseq layout: ``feature_extractor``,
            ``post_extract_proj``, ``encoder.pos_conv``, ``encoder.layers``).
        conv: copy the conv extractor and the feature projection.
        encoder: copy the positional conv and one transformer layer for each of the student's.
        layers: the transformer layers to copy, counted from 0; None: the first ones.
        same: whether the student must compute the same with these weights.

    Raises:
        TeacherError: a teacher has another layout or another shape, or with ``same`` other strides,
            attention heads, activation or place of the layer norms.
    """
    backbone = student.backbone
    paths: list[tuple[str, str]] = []  # (in the student, in the teacher)
    if conv:
        paths.append(("feature_extractor", "feature_extractor"))
        # absent where the conv extractor is as wide as the transformer layers
        models = (backbone, *teachers)
        if any(getattr(model, "post_extract_proj", None) is not None for model in models):
            paths.append(("post_extract_proj", "post_extract_proj"))
    if encoder:
        paths.append(("encoder.pos_conv", "encoder.pos_conv"))
        sources = range(student.settings.encoder_layers) if layers is None else layers
        paths += [(f"encoder.layers.{i}", f"encoder.layers.{n}") for i, n in enumerate(sources)]
    for target, source in paths:
        _copy(backbone, teachers, target, source, same)


def _copy(
    student: nn.Module, teachers: Sequence[nn.Module], target: str, source: str, same: bool
) -> None:
    into = _get(student, target, "student")
    states = []
    for teacher in teachers:
        module = _get(teacher, source, "teacher")
        weights = module.state_dict()
        extra = [key for key in weights if WAVLM_ONLY.search(key)]
        for key in extra:
            del weights[key]
        if extra:
            logger.info("init: %s: not copied, only in WavLM: %s", source, ", ".join(extra))
        _check_fit(weights, into.state_dict(), source)
        if same:
            _check_settings(_settings(module), _settings(into), source)
        states.append(weights)
    into.load_state_dict(
        {key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]}
    )


def _check_fit(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], path: str) -> None:
    """Raise TeacherError unless both state dicts have the same keys and shapes."""
    for key in sorted(teacher.keys() | student.keys()):
        shape = list(teacher[key].shape) if key in teacher else "missing"
        expected = list(student[key].shape) if key in student else "missing"
        if shape != expected:
            raise TeacherError(
                f"init.teacher does not fit the student: {path}.{key} is {shape} in the teacher "
                f"and {expected} in the student; {_INSTEAD}"
            )


def _settings(module: Any) -> dict[str, Any]:
    """What a conv extractor or a transformer layer computes beyond its weights, by the student's
    key."""
    if hasattr(module, "conv_layers"):
        strides = [block[0].stride[0] for block in module.conv_layers]
        return {"extractor_conv_feature_layers": f"strides {strides}"}
    if not hasattr(module, "self_attn"):
        return {}
    return {
        "layer_norm_first": str(module.layer_norm_first).lower(),
        "encoder_attention_heads": module.self_attn.num_heads,
        "activation_fn": module.activation_fn.__name__,
    }


def _check_settings(teacher: Mapping[str, Any], student: Mapping[str, Any], path: str) -> None:
    """Raise TeacherError unless both have the same :func:`_settings`."""
    for key, value in student.items():
        if teacher[key] != value:
            part = "conv" if key.startswith("extractor") else "encoder"
            raise TeacherError(
                f"init.teacher does not fit the student: {path} has {key}: {teacher[key]} in the "
                f"teacher and {value} in the student, so its weights would compute something else; "
                f"set student.{key} to the teacher's, or init.{part}: false"
            )


def _get(model: nn.Module, path: str, owner: str) -> nn.Module:
    """The submodule at a dotted path; ``owner``: student or teacher, for the message."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise TeacherError(
            f"init.teacher does not fit the student: the {owner} has no {path}; {_INSTEAD}"
        ) from None
