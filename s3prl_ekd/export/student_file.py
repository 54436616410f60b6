"""The student file: plain tensors and plain settings, loadable with ``weights_only=True``.

``{"format", "version", "settings", "targets", "head_kind", "student", "heads", "about"}``: the
student's size, the target sets its heads predict, its weights and theirs, and how it was made. A
run's checkpoint holds the same under s3prl's keys, so both are read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..atomic import whole_file
from ..build_limit import build_limit
from ..compat import checkpoint_globals
from ..distill.aggregation import TargetSpec
from ..distill.heads import PredictionHeads
from ..distill.settings import StudentSettings
from ..distill.student import Student
from ..distill.student_size import check_size
from ..distill.target_settings import HeadSettings
from ..errors import CheckpointError, ConfigError, EkdError
from ..plain_files import first_keys
from ..safe_load import safe_load
from ..schema import build, plain

FORMAT, VERSION = "s3prl_ekd.student", 1
RUN_KEY = "EKD"  # where a run's checkpoint keeps the contents of a student file


@dataclass
class LoadedStudent:
    """A student read from a file. ``heads`` is None where the file has none."""

    student: Student
    heads: PredictionHeads | None
    targets: dict[str, TargetSpec]
    about: dict[str, Any]


def contents(student: Student, heads: PredictionHeads | None, targets, about: Mapping) -> dict:
    """What a student file holds, as plain data: see the module's text."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "settings": plain(student.settings),
        "targets": {name: plain(spec) for name, spec in targets.items()} if heads else {},
        "head_kind": heads.kind if heads else "split",
        "student": _cpu(student.state_dict()),
        "heads": _cpu(heads.state_dict()) if heads else {},
        "about": dict(about),
    }


def write_student(loaded: LoadedStudent, path: str | Path, keep_heads: bool = True) -> None:
    """Write a student file, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    heads = loaded.heads if keep_heads else None
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            torch.save(contents(loaded.student, heads, loaded.targets, loaded.about), file)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None


def load_student(path: str | Path) -> LoadedStudent:
    """Read a student file or a run's checkpoint (``states-*.ckpt``), in eval mode.

    Raises:
        CheckpointError: the file is missing, damaged, asks for code, or is of another kind.
    """
    data = safe_load(path, "student checkpoint", allow=checkpoint_globals())
    if RUN_KEY in data and isinstance(data[RUN_KEY], dict):
        data = data[RUN_KEY]
    if data.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is neither a student file nor a checkpoint of run_pretrain.py -u ekd; its "
            f"keys are: {first_keys(data)}"
        )
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            f"{path} has format version {str(version)[:20]}; this s3prl_ekd reads {VERSION}"
        )
    try:
        with build_limit(path):
            return _built(data)
    except ConfigError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    except EkdError:
        raise
    except Exception as error:  # s3prl and torch raise whatever a damaged file makes them raise
        first = (str(error).strip().splitlines() or ["unreadable"])[0]
        raise CheckpointError(f"{path} is damaged: {first}") from None


def _built(data: Mapping[str, Any]) -> LoadedStudent:
    settings = build(StudentSettings, data.get("settings"), "settings")
    check_size(settings)
    targets = build(dict[str, TargetSpec], data.get("targets"), "targets")
    student = Student(settings)
    student.load_state_dict(data["student"])
    heads = None
    if targets:
        kind = build(HeadSettings, {"kind": data.get("head_kind", "split")}, "head_kind").kind
        heads = PredictionHeads(student.width, targets, kind)
        heads.load_state_dict(data["heads"])
    about = build(dict[str, Any], data.get("about"), "about")
    return LoadedStudent(student.eval(), heads.eval() if heads else None, targets, about)


def heads_problem(loaded: LoadedStudent) -> str:
    """Why the heads' outputs cannot stand among the hidden states; empty where they can."""
    if loaded.heads is None:
        return "the file has no prediction heads"
    widths = {part for spec in loaded.targets.values() for part in spec.parts}
    if widths != {loaded.student.width}:
        return f"the heads predict widths {sorted(widths)}, the student has {loaded.student.width}"
    return ""


def _cpu(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().to("cpu", torch.float32) for key, value in state.items()}
