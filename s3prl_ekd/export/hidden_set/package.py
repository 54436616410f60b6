"""The hidden-set package: a student's weights under the names of ``package/expert.py``.

SUPERB's organisers clone a folder of six files and build ``UpstreamExpert`` from it with torch and
nothing of ours; ``package/`` has the files that are the same for every student.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...student_file import LoadedStudent, heads_problem

TEMPLATES = Path(__file__).parent / "template"
FILES = ("expert.py", "model.pt", "requirements.txt", "README.md", "LICENSE", "cli.py")
_COPIED = {"expert.py": "expert.py", "cli.py": "cli.py", "requirements.txt": "requirements.txt"}
_COPIED["license.txt"] = "LICENSE"

# Names of s3prl's DistillerModel -> names in package/expert.py.
_RENAMED = (
    (r"feature_extractor\.conv_layers\.(\d+)\.(\d+)\.(?:1\.)?(\w+)", r"extractor.blocks.\1.\2.\3"),
    (r"post_extract_proj\.(\w+)", r"projection.\1"),
    (r"encoder\.pos_conv\.0\.weight_g", "position.magnitude"),
    (r"encoder\.pos_conv\.0\.weight_v", "position.direction"),
    (r"encoder\.pos_conv\.0\.bias", "position.bias"),
    (r"encoder\.layer_norm\.(\w+)", r"norm.\1"),
    (r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", r"layers.\1.attention.query.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.k_proj\.(\w+)", r"layers.\1.attention.key.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.v_proj\.(\w+)", r"layers.\1.attention.value.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)", r"layers.\1.attention.out.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.(\w+)", r"layers.\1.attention_norm.\2"),
    (r"encoder\.layers\.(\d+)\.fc1\.(\w+)", r"layers.\1.ffn_in.\2"),
    (r"encoder\.layers\.(\d+)\.fc2\.(\w+)", r"layers.\1.ffn_out.\2"),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.(\w+)", r"layers.\1.ffn_norm.\2"),
)

# Of a head: our name behind ``net.`` -> its name there and its shape. A ``SplitLinear`` has a plain
# linear layer, ``[out, in]``, where there is one target layer.
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
    """What ``model.pt`` holds: ``config``, the arguments of its ``Student``, and ``weights``.

    Raises:
        CheckpointError: the heads are to be kept and cannot stand among the hidden states.
    """
    problem = heads_problem(loaded)
    if keep_heads and problem:
        raise CheckpointError(f"the heads cannot be kept: {problem}; add --heads drop")
    settings = loaded.student.settings
    heads = {}
    if keep_heads:
        heads = {
            name: {"layers": spec.layers, "parts": list(spec.parts)}
            for name, spec in loaded.targets.items()
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
        "heads": heads,
        "head_kind": loaded.heads.kind if heads else "split",
        "dropout": settings.dropout,
        "attention_dropout": settings.attention_dropout,
        "activation_dropout": settings.activation_dropout,
        "extractor_dropout": settings.extractor_dropout,
    }
    weights = _backbone(loaded.student.backbone.state_dict())
    if settings.layer_norm_first and not heads:  # only the heads read what this norm gives
        weights = {name: value for name, value in weights.items() if not name.startswith("norm.")}
    if heads:
        weights.update(_heads(loaded.heads.state_dict()))
    return {
        "config": config,
        "weights": {name: value.detach().clone().contiguous() for name, value in weights.items()},
    }


def write_package(contents: Mapping[str, Any], card: str, folder: Path) -> None:
    """Write the six files into ``folder``."""
    for source, target in _COPIED.items():
        shutil.copyfile(TEMPLATES / source, folder / target)
    # As text, because torch 1.13 reads no number with a point with weights_only=True.
    saved = {**contents, "config": json.dumps(contents["config"])}
    torch.save(saved, folder / "model.pt")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _backbone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_renamed(name): value for name, value in state.items()}


def _renamed(name: str) -> str:
    for pattern, new in _RENAMED:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, new, name)
    raise KeyError(name)  # s3prl's model has a weight that the package does not know


def _heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = {}
    for name, value in state.items():
        head, _, rest = name.partition(".net.")
        new, reshape = _HEAD_WEIGHTS[rest]
        weights[f"heads.{head}.{new}"] = reshape(value)
    return weights
