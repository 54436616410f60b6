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

    Raises:
        CheckpointError: ``keep_heads`` is set, but the heads cannot be exported as hidden states.
    """
    problem = heads_problem(loaded)
    if keep_heads and problem:
        raise CheckpointError(f"cannot keep the heads: {problem}; add --heads drop")
    settings = loaded.student.settings
    heads = loaded.heads if keep_heads else None
    head_config = {
        name: {"layers": spec.layers, "parts": list(spec.parts)}
        for name, spec in (loaded.targets.items() if keep_heads else ())
    }
    config = {
        "conv_layers": [list(layer) for layer in settings.conv_layers],
        "conv_norm": settings.extractor_mode,
        "dim": settings.encoder_embed_dim,
        "ffn_dim": settings.encoder_ffn_embed_dim,
        "attention_heads": settings.encoder_attention_heads,
        "layers": settings.encoder_layers,
        "activation": settings.activation_fn,
        "norm_first": settings.layer_norm_first,
        "conv_pos": settings.conv_pos,
        "conv_pos_groups": settings.conv_pos_groups,
        "heads": head_config,
        "head_kind": "split" if heads is None else heads.kind,
        "dropout": settings.dropout,
        "attention_dropout": settings.attention_dropout,
        "activation_dropout": settings.activation_dropout,
        "extractor_dropout": settings.extractor_dropout,
    }
    weights = loaded.student.backbone.state_dict()
    if settings.layer_norm_first and not head_config:  # only the heads use this norm
        del weights["encoder.layer_norm.weight"], weights["encoder.layer_norm.bias"]
    if heads is not None:
        for name, value in heads.state_dict().items():
            head, _, suffix = name.partition(".net.")
            new_suffix, reshape = _HEAD_WEIGHTS[suffix]
            weights[f"heads.{head}.{new_suffix}"] = reshape(value)
    return {
        "config": config,
        "weights": {name: value.detach().clone().contiguous() for name, value in weights.items()},
    }


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
