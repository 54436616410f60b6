"""The student file: weights and settings of a student, without code.

Its keys are ``format``, ``version``, ``settings`` (size of the student), ``targets`` (target sets
that the heads predict), ``head_kind``, ``student`` and ``heads`` (weights) and ``about`` (how the
student was trained). Version 2 is for copied and pruned students, whose ``settings`` are those of
``PrunedSettings``, and for layer-to-layer heads, whose settings are in ``head_settings``. Version 3
is for students with ``masked_norm``. Other students are written as version 1. A checkpoint of a run
has the same contents under the key ``EKD``.

A ``.safetensors`` file has the tensors as ``student.KEY`` and ``heads.KEY``, and in its metadata
``format``, ``version`` and, as JSON in ``contents``, the remaining keys. With any other suffix the
file is written by ``torch.save`` and can be loaded with ``weights_only=True``.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .compat import checkpoint_globals
from .distill.aggregation import TargetSpec
from .distill.conv_layers import ConvLayers
from .distill.heads import PredictionHeads, check_layers
from .distill.settings import HeadSettings
from .distill.student import Student
from .distill.student_settings import (
    Architecture,
    CopySettings,
    FileSettings,
    PrunedSettings,
    StudentSettings,
    check_size,
)
from .errors import CheckpointError
from .files.atomic import atomic_file, explain_write_errors
from .files.config import from_plain_data, to_plain_data
from .files.formats import CHECKPOINT_PARTS, STUDENT, check_format_version, check_part_versions
from .files.safetensors_file import (
    SUFFIX,
    is_safetensors,
    open_safetensors,
    read_safetensors,
    write_safetensors,
)
from .files.text import first_keys, parse_json
from .files.torch_load import build_limit, safe_load

RUN_KEY = STUDENT  # key of the student in a checkpoint of a run
FORMAT, VERSION = "s3prl_ekd.student", CHECKPOINT_PARTS[RUN_KEY]
_JSON = ("settings", "targets", "head_kind", "head_settings", "about")


@dataclass
class LoadedStudent:
    """A student read from a file; ``heads`` is None if the file has no heads."""

    student: Student
    heads: PredictionHeads | None
    targets: dict[str, TargetSpec]
    about: dict[str, Any]


def contents(
    student: Student,
    heads: PredictionHeads | None,
    targets: Mapping[str, TargetSpec],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The contents of a student file; see the docstring of the module."""
    specs = {name: to_plain_data(spec) for name, spec in targets.items()} if heads else {}
    layerwise = heads is not None and heads.kind == "layerwise"
    data = {
        "format": FORMAT,
        "version": 2 if layerwise or isinstance(student.settings, PrunedSettings) else 1,
        "settings": architecture(student.settings),
        "targets": specs,
        "head_kind": heads.kind if heads else "split",
        "student": _cpu(student.state_dict()),
        "heads": _cpu(heads.state_dict()) if heads else {},
        "about": dict(about),
    }
    if student.settings.masked_norm:
        data["version"] = 3
    if heads is not None and layerwise:
        data["head_settings"] = to_plain_data(heads.settings)
    else:
        for spec in specs.values():
            del spec["members"]
    return data


def write_student(loaded: LoadedStudent, path: str | Path, keep_heads: bool = True) -> None:
    """Write a student file atomically; the suffix decides the format.

    Raises:
        CheckpointError: the file cannot be written.
    """
    heads = loaded.heads if keep_heads else None
    path = Path(path)
    data = contents(loaded.student, heads, loaded.targets, loaded.about)
    with explain_write_errors(path, CheckpointError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            if path.suffix == SUFFIX:
                _write_safetensors(data, file)
            else:
                torch.save(data, file)


def load_student(path: str | Path) -> LoadedStudent:
    """Read a student file or a run's checkpoint (``states-*.ckpt``), in eval mode.

    Raises:
        CheckpointError: the file is missing, damaged, of a newer format or of another kind, or
            would run code.
    """
    if is_safetensors(path):
        data = _from_safetensors(path)
    else:
        data = safe_load(path, "student checkpoint", allow=checkpoint_globals())
    check_part_versions(data, path)
    if RUN_KEY in data and isinstance(data[RUN_KEY], dict):
        data = data[RUN_KEY]
    if data.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is neither a student file nor a checkpoint of run_pretrain.py -u ekd; it has "
            f"the keys {first_keys(data)}"
        )
    version = data.get("version")
    check_format_version(version, VERSION, f"the student file {path}")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} is damaged: its format version is {version!r:.20}")
    try:
        with build_limit(path):
            return _build(data)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can raise anything in s3prl and torch
        lines = [line.strip() for line in str(error).strip().splitlines()] or ["unreadable"]
        raise CheckpointError(f"{path} is damaged: {' '.join(lines[:2])[:500]}") from None


def is_student(path: str | Path) -> bool:
    """Whether a safetensors file is a student file, and not weights of a Hugging Face folder.

    Raises:
        CheckpointError: the file is damaged.
    """
    with open_safetensors(path, "student file") as file:
        return (file.metadata() or {}).get("format") == FORMAT


def _write_safetensors(data: Mapping[str, Any], file: BinaryIO) -> None:
    """:func:`contents` as a safetensors file. Raises CheckpointError."""
    tensors = {
        f"{part}.{key}": tensor
        for part in ("student", "heads")
        for key, tensor in data[part].items()
    }
    try:
        text = json.dumps({key: data[key] for key in _JSON if key in data}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"cannot write the student file: {error}") from None
    metadata = {"format": FORMAT, "version": str(data["version"]), "contents": text}
    write_safetensors(file, tensors, metadata)


def _from_safetensors(path: str | Path) -> dict[str, Any]:
    """Read :func:`contents` from a safetensors file. Raises CheckpointError."""
    what = "student file"
    metadata, tensors = read_safetensors(path, what)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has weights only and is not a student file; type: s3prl-ekd export student "
            "FOLDER, with the folder that has the weights and their config.json"
        )
    version: Any = metadata.get("version", "")
    if version.isascii() and version.isdigit() and len(version) < 10:
        version = int(version)
    check_format_version(version, VERSION, f"the {what} {path}")  # before its contents are parsed
    data = parse_json(metadata.get("contents", ""), path, what, CheckpointError)
    data |= {"format": FORMAT, "version": version, "student": {}, "heads": {}}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        if part not in ("student", "heads"):
            raise CheckpointError(f"the {what} {path} is damaged: unknown tensor {name[:60]!r}")
        data[part][key] = tensor
    return data


def _build(data: Mapping[str, Any]) -> LoadedStudent:
    settings = read_architecture(data.get("settings"))
    check_size(settings)
    targets = from_plain_data(dict[str, TargetSpec], data.get("targets"), "targets")
    student = Student(settings)
    student.load_state_dict(data["student"])
    heads = None
    if targets:
        plain = data.get("head_settings", {"kind": data.get("head_kind", "split")})
        head_settings = from_plain_data(HeadSettings, plain, "head_settings")
        if head_settings.kind == "layerwise":
            check_layers(targets, settings)
        heads = PredictionHeads(student.width, targets, head_settings)
        heads.load_state_dict(data["heads"])
    about = from_plain_data(dict[str, Any], data.get("about"), "about")
    return LoadedStudent(student.eval(), heads.eval() if heads else None, targets, about)


def architecture(settings: Architecture) -> dict[str, Any]:
    """The ``settings`` of a student file: without ``mask`` and ``train_extractor``, which are for
    training only, and with ``masked_norm`` only if it is on, so that version 0.1 can read files of
    other students."""
    data: dict[str, Any] = to_plain_data(settings)
    for key in ("mask", "train_extractor"):
        data.pop(key, None)
    if not settings.masked_norm:
        del data["masked_norm"]
    return data


def read_architecture(data: Any, location: str = "settings") -> Architecture:
    """A student's ``settings`` in a student file. Raises ConfigError."""
    if isinstance(data, dict) and "ffn_dims" in data:
        return from_plain_data(PrunedSettings, data, location)
    return from_plain_data(StudentSettings, data, location)


def input_layers(student: StudentSettings | CopySettings | FileSettings) -> ConvLayers:
    """The conv layers of an experiment's student; kernels and strides are final, channels may not.

    Raises:
        CheckpointError: see :func:`load_student`.
    """
    if isinstance(student, FileSettings):
        return load_student(student.file).student.settings.conv_layers
    return student.conv_layers


def require_cut(student: Student, path: str | Path) -> None:
    """Check that the student of the file ``path`` has its final size.

    Raises:
        CheckpointError: it still has gates.
    """
    if not student.is_cut:
        raise CheckpointError(
            f"the student of {path} still has gates, so its size is not final; type: s3prl-ekd "
            f"prune {shlex.quote(str(path))} -o pruned.pt, and use pruned.pt"
        )


def heads_problem(loaded: LoadedStudent) -> str:
    """Why the outputs of the heads cannot be appended to the hidden states; empty if they can."""
    if loaded.heads is None:
        return "the file has no prediction heads"
    widths = {part for spec in loaded.targets.values() for part in spec.parts}
    if widths != {loaded.student.width}:
        return f"the heads predict widths {sorted(widths)}, the student has {loaded.student.width}"
    return ""


def _cpu(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().to("cpu", torch.float32) for key, value in state.items()}
