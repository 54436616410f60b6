"""Average students that were distilled from different teachers (arXiv 2505.13270).

Paper (abstract, and a published summary of its text): DistilHuBERT's students of HuBERT and of MERT
start with equal weights θ₀, HuBERT's conv extractor and first two layers. The differences θᵢ - θ₀
("distilled task vectors") are interpolated and added to θ₀; the result did better than one student
of both teachers. For weights that sum to 1 it is the average Σ wᵢ·θᵢ, so θ₀ itself is not needed.
Inferred: parameters are averaged as they are trained, so the two factors of the positional
convolution's weight norm separately. Ours: more than two students, equal weights as the default,
the check of θ₀ by its digest, no prediction heads, since those of each student predict other
teachers.

The average is meaningful as long as the students did not move far from θ₀. Students of different
θ₀ have hidden units in different orders, which an average mixes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..distill.student import Student
from ..distill.student_settings import Architecture
from ..errors import CheckpointError, ConfigError
from ..files.config import from_plain_data
from ..files.config_diff import config_differences, describe_changes
from ..student_file import LoadedStudent, architecture, require_cut
from ..teachers.student_source import contents_sha256

ASSUME = "--assume-same-start"
_HOW_TO_START = (
    "give every run the same init.teacher (a teacher of weight: 0 teaches nothing, but may give "
    "the first weights), or one file (student: {kind: file, file: START.pt, keep_heads: false}), "
    "or init: {teacher: null} and one seed"
)

# Settings that change a student in training only; those of merged students may differ.
TRAINING_SETTINGS = frozenset(
    {
        "dropout",
        "attention_dropout",
        "activation_dropout",
        "input_dropout",
        "extractor_dropout",
        "encoder_layerdrop",
        "feature_grad_mult",
    }
)


@dataclass(frozen=True)
class Member:
    """A student to be merged, and the file that it was read from."""

    path: Path
    loaded: LoadedStudent

    @property
    def initial_weights(self) -> str | None:
        """The digest of its weights before training; None if the file does not have it."""
        digest = self.loaded.about.get("initial_weights")
        return digest if isinstance(digest, str) else None


def merge(
    members: Sequence[Member],
    weights: Sequence[float] | None = None,
    assume_same_start: bool = False,
) -> LoadedStudent:
    """The weighted average of students, without prediction heads.

    Args:
        members: at least two, of one architecture and one initialisation.
        weights: one for each student, 0 or more; they are divided by their sum. None: equal.
        assume_same_start: accept files without the digest of the initial weights, which version
            0.1 did not store; digests that differ are never accepted.

    Returns:
        The student in eval mode, with the first one's dropout, layer drop and factor on the conv
        extractor's gradient. ``about["merged"]`` has the name and SHA-256 of each file, its weight
        and its own ``about``. ``about["initial_weights"]`` is there if all files have it;
        otherwise ``about["assumed_same_start"]`` is true.

    Raises:
        ConfigError: fewer than two students, or invalid weights.
        CheckpointError: the students do not fit together, one has gates or was cut and not
            distilled again, or their average is not finite.
    """
    if len(members) < 2:
        raise ConfigError(f"expected at least two students to merge, got {len(members)}")
    shares = normalised(weights, len(members))
    for member in members:
        require_cut(member.loaded.student, member.path)
        _refuse_fresh_cut(member)
    _check_architectures(members)
    digest = _common_start(members, assume_same_start)
    states = [member.loaded.student.state_dict() for member in members]
    student = Student(members[0].loaded.student.settings)
    student.load_state_dict(
        {key: average([state[key] for state in states], shares) for key in states[0]}
    )
    for key, tensor in student.state_dict().items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"the average of {key} is not finite: a student has diverged")
    return LoadedStudent(student.eval(), None, {}, _about(members, shares, digest))


def normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights that sum to 1; equal ones for None. Raises ConfigError."""
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ConfigError(f"--weights: expected {count}, one for each student, got {len(weights)}")
    total = sum(weights)  # inf if it is too large, where math.fsum raises OverflowError
    if not all(0 <= weight < math.inf for weight in weights) or not 0 < total < math.inf:
        given = " ".join(f"{weight:g}" for weight in weights)
        raise ConfigError(f"--weights must be 0 or more and not all 0, got {given}")
    return [weight / total for weight in weights]


def average(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ shareᵢ·tensorᵢ, computed in float64, in the type of the first tensor."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        total += share * tensor.double()
    return total.to(tensors[0].dtype)


def _refuse_fresh_cut(member: Member) -> None:
    """Raise CheckpointError for an output of `prune` that was not distilled again."""
    if member.loaded.about.get("pruned") and member.initial_weights is None:
        raise CheckpointError(
            f"{member.path} was cut by prune, which keeps other units in each run; merge students "
            "of the second distillation from one cut"
        )


def _check_architectures(members: Sequence[Member]) -> None:
    first = members[0]
    settings = first.loaded.student.settings
    for member in members[1:]:
        other = member.loaded.student.settings
        if type(other) is not type(settings):
            raise CheckpointError(
                f"cannot merge {first.path} and {member.path}: one is a copy of a teacher, the "
                "other is not; merge students of one architecture"
            )
        changes = config_differences(_size(settings), _size(other))
        if changes:
            raise CheckpointError(
                f"cannot merge {first.path} and {member.path}, whose settings differ: "
                f"{describe_changes(changes)}; merge students of one architecture"
            )


def _size(settings: Architecture) -> dict[str, Any]:
    """The settings that merged students have in common."""
    data = architecture(settings)
    return {key: value for key, value in data.items() if key not in TRAINING_SETTINGS}


def _common_start(members: Sequence[Member], assume_same_start: bool) -> str | None:
    """The digest of the students' common initial weights; None if a file does not have it."""
    known = [member for member in members if member.initial_weights is not None]
    for member in known[1:]:
        if member.initial_weights != known[0].initial_weights:
            raise CheckpointError(
                f"cannot merge {known[0].path} and {member.path}: their trainings began with "
                "different weights, so their hidden units are in different orders and an average "
                f"would mix unrelated ones; {_HOW_TO_START}"
            )
    unknown = [str(member.path) for member in members if member.initial_weights is None]
    if unknown and not assume_same_start:
        raise CheckpointError(
            f"no record of the initial weights in {', '.join(unknown)}, and an average of "
            "students that began with different weights mixes unrelated hidden units; if the "
            f"trainings began with the same weights, add {ASSUME}; otherwise {_HOW_TO_START}"
        )
    return None if unknown else known[0].initial_weights


def _about(
    members: Sequence[Member], shares: Sequence[float], digest: str | None
) -> dict[str, Any]:
    """``about`` of the merged student."""
    merged = []
    for member, share in zip(members, shares, strict=True):
        own = {key: value for key, value in member.loaded.about.items() if key != "initial_weights"}
        merged.append(
            {
                "file": member.path.name,
                "sha256": contents_sha256(member.path),
                "weight": share,
                "about": own,
            }
        )
    about: dict[str, Any] = {"made_by": f"s3prl_ekd {__version__}", "merged": merged}
    if digest is None:
        about["assumed_same_start"] = True
    else:
        about["initial_weights"] = digest
    pruned = members[0].loaded.about.get("pruned")
    if pruned and all(member.loaded.about.get("pruned") == pruned for member in members):
        about["pruned"] = pruned
    return from_plain_data(dict[str, Any], about, "about")  # refuses too many merges of merges
