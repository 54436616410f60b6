"""Write a hidden-set package: a student's weights, and code that runs them with torch alone.

SUPERB's organisers clone a folder of six files and build ``UpstreamExpert`` from it, without
s3prl_ekd. ``template/`` has the files that are the same for every student. In ``expert.py``, the
code of :mod:`s3prl_ekd.distill.student_forward` replaces its import.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...distill import student_forward
from ...distill.aggregation import TargetSpec
from ...distill.heads import LayerwiseHead, PredictionHeads
from ...distill.student_settings import Architecture, StudentSettings
from ...errors import CheckpointError
from ...student_file import LoadedStudent, heads_problem
from .static_checks import REQUIRED_FILES, SUBMISSION_FILES

TEMPLATES = Path(__file__).parent / "template"
FILES = (*REQUIRED_FILES, *SUBMISSION_FILES)
_COPIED = {"cli.py": "cli.py", "requirements.txt": "requirements.txt", "license.txt": "LICENSE"}

# The template's only import from s3prl_ekd; expert_source() replaces it by the module's code.
_IMPORT = "from ....distill.student_forward import student_forward\n"
_FUTURE = "from __future__ import annotations\n"

# Weights of a head: the name after ``net.`` -> its name in the package, and a function that
# reshapes it. ``SplitLinear`` is one linear layer, ``[out, in]``, if the head predicts one layer.
_HEAD_WEIGHTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "0.weight": ("hidden.weight", lambda value: value),
    "0.bias": ("hidden.bias", lambda value: value),
    "2.weight": ("weight", lambda value: value),
    "2.bias": ("bias", lambda value: value[0, 0][:, None, None]),
    "2.layer.weight": ("weight", lambda value: value.T[None]),
    "2.layer.bias": ("bias", lambda value: value[None, None, None]),
    "weight": ("out.weight", lambda value: value),
    "bias": ("out.bias", lambda value: value),
}


def package_contents(loaded: LoadedStudent, keep_heads: bool) -> dict[str, Any]:
    """Contents of ``model.pt``: ``config`` (arguments of its ``Student``) and ``weights``.

    The student has no gates, see :func:`..student_file.require_cut`.

    Raises:
        CheckpointError: ``keep_heads`` is set, but the heads cannot be exported as hidden states.
    """
    problem = heads_problem(loaded)
    if keep_heads and problem:
        raise CheckpointError(f"cannot keep the heads: {problem}; add --heads drop")
    heads = loaded.heads if keep_heads else None
    config = {
        **_architecture(loaded.student.settings),
        "heads": {} if heads is None else _head_config(heads, loaded.targets),
        "head_kind": "split" if heads is None else heads.kind,
    }
    weights = loaded.student.backbone.state_dict()
    norm_first, is_copy = config["norm_first"], config["copy"] is not None
    if norm_first and not is_copy and (heads is None or heads.kind == "layerwise"):
        # of a student that is no copy, only the heads on its last layer use this norm
        del weights["encoder.layer_norm.weight"], weights["encoder.layer_norm.bias"]
    if heads is not None:
        for name, value in heads.state_dict().items():
            head, net, suffix = name.partition(".net.")
            if not net:  # a layerwise head, which has the same names in the package
                weights[f"heads.{name}"] = value
                continue
            new_suffix, reshape = _HEAD_WEIGHTS[suffix]
            weights[f"heads.{head}.{new_suffix}"] = reshape(value)
    return {
        "config": config,
        "weights": {name: value.detach().clone().contiguous() for name, value in weights.items()},
    }


def _architecture(settings: Architecture) -> dict[str, Any]:
    """The student's part of ``config``, documented in the template's ``Student``."""
    config = {
        "conv_layers": [list(layer) for layer in settings.conv_layers],
        "conv_norm": settings.extractor_mode,
        "masked_norm": settings.masked_norm,
        "conv_bias": False,
        "dim": settings.encoder_embed_dim,
        "attention_heads": settings.encoder_attention_heads,
        "activation": settings.activation_fn,
        "norm_first": settings.layer_norm_first,
        "conv_pos": settings.conv_pos,
        "conv_pos_groups": settings.conv_pos_groups,
        "dropout": settings.dropout,
        "attention_dropout": settings.attention_dropout,
        "activation_dropout": settings.activation_dropout,
        "extractor_dropout": 0.0,
        "copy": None,
    }
    if isinstance(settings, StudentSettings):
        return config | {
            "ffn_dims": [settings.encoder_ffn_embed_dim] * settings.encoder_layers,
            "extractor_dropout": settings.extractor_dropout,
        }
    copy = {
        "heads": [list(places) for places in settings.heads],
        "normalize_waveforms": settings.normalize_waveforms,
        "feature_scale": settings.feature_scale,
        "position_buckets": settings.position_buckets,
        "max_distance": settings.max_distance,
        "input_dropout": settings.input_dropout,
    }
    return config | {
        "conv_bias": settings.conv_bias,
        "ffn_dims": list(settings.ffn_dims),
        "copy": copy,
    }


def _head_config(
    heads: PredictionHeads, targets: Mapping[str, TargetSpec]
) -> dict[str, dict[str, Any]]:
    """The heads' part of ``config``."""
    config: dict[str, dict[str, Any]] = {}
    for name, spec in targets.items():
        config[name] = {"layers": spec.layers, "parts": list(spec.parts)}
        if isinstance(head := heads[name], LayerwiseHead):
            config[name]["targets"] = [
                [use, list(states)] for use, states in zip(head.uses, head.sources, strict=True)
            ]
    return config


def expert_source() -> str:
    """Text of ``expert.py``: the template with the code of ``student_forward`` filled in."""
    template = (TEMPLATES / "expert.py").read_text(encoding="utf-8")
    head, marker, tail = template.partition(_IMPORT)
    assert marker, _IMPORT
    forward = inspect.getsource(student_forward).partition(_FUTURE)[2]
    return f"{head}# s3prl_ekd/distill/student_forward.py:\n{forward.strip()}\n\n{tail}"


def write_package(contents: Mapping[str, Any], card: str, folder: Path) -> None:
    """Write the six files into ``folder``."""
    for source, target in _COPIED.items():
        shutil.copyfile(TEMPLATES / source, folder / target)
    (folder / "expert.py").write_text(expert_source(), encoding="utf-8")
    # As JSON text: with weights_only=True, torch 1.13 cannot load floats.
    saved = {**contents, "config": json.dumps(contents["config"])}
    torch.save(saved, folder / "model.pt")
    (folder / "README.md").write_text(card, encoding="utf-8")
