"""Give the student a teacher's first weights (inferred: DistilHuBERT's initialisation)."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import TeacherError
from .student import Student

logger = logging.getLogger(__name__)

# WavLM's attention has gates and relative positions that HuBERT's, and so the student's, lacks.
WAVLM_ONLY = re.compile(r"self_attn\.(grep_linear\.|grep_a$|relative_attention_bias\.)")


def initialise(student: Student, teacher: nn.Module, *, conv: bool, encoder: bool) -> None:
    """Copy a teacher's first weights into the student.

    Args:
        student: is changed in place.
        teacher: the teacher's own model (fairseq layout: ``feature_extractor``,
            ``post_extract_proj``, ``encoder.pos_conv``, ``encoder.layers``).
        conv: copy the conv extractor and the feature projection.
        encoder: copy the positional conv and as many first layers as the student has.

    Raises:
        TeacherError: the teacher is not of this layout, or a shape differs.
    """
    ours = student.backbone
    if conv:
        _copy(ours, teacher, "feature_extractor")
        if ours.post_extract_proj is not None or _get(teacher, "post_extract_proj") is not None:
            _copy(ours, teacher, "post_extract_proj")
    if encoder:
        _copy(ours, teacher, "encoder.pos_conv")
        for layer in range(student.settings.encoder_layers):
            _copy(ours, teacher, f"encoder.layers.{layer}")


def _copy(student: nn.Module, teacher: nn.Module, path: str) -> None:
    source, target = _get(teacher, path), _get(student, path)
    if source is None or target is None:
        who = "teacher" if source is None else "student"
        raise TeacherError(
            f"init.teacher does not fit the student: the {who} has no {path}; "
            "choose another init.teacher, change the student's size, or set init.teacher: null"
        )
    weights = source.state_dict()
    extra = [key for key in weights if WAVLM_ONLY.search(key)]
    for key in extra:
        del weights[key]
    if extra:
        logger.info("init: %s: left out WavLM's %s", path, ", ".join(extra))
    _check_fit(weights, target.state_dict(), path)
    target.load_state_dict(weights)


def _check_fit(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str) -> None:
    for key in sorted(weights.keys() | wanted.keys()):
        have = list(weights[key].shape) if key in weights else "nothing"
        want = list(wanted[key].shape) if key in wanted else "nothing"
        if have != want:
            raise TeacherError(
                f"init.teacher does not fit the student: {path}.{key} is {have} in the teacher and "
                f"{want} in the student; change the student's size or set init.teacher: null"
            )


def _get(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = getattr(module, name, None) if not name.isdigit() else _item(module, int(name))
        if module is None:
            return None
    return module


def _item(layers: nn.Module, index: int) -> nn.Module | None:
    return layers[index] if index < len(layers) else None
