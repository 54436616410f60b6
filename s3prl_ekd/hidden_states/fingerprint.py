"""What stored targets depend on, as plain data, and in words where a run has it otherwise.

A teacher is known by its weights, its class and its answer to a second of noise, never by a path:
the same file under another name is the same teacher, another one under the same name is not. The
answer tells what the weights do not (whether a waveform is normalised first, for instance); it is
compared with a tolerance, as it differs a little from machine to machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..data.sampling import used
from ..data.tables import Utterance
from ..distill.settings import DistillSettings, TeacherSettings
from ..distill.teachers import PROBE_SAMPLES, TeacherEnsemble
from ..errors import ConfigError
from .store import PER_TEACHER, Block, Index, Layout, Part, part_of

TOLERANCE = 0.01  # of the answer; devices and versions differ by far less (ours)

# Classes of ours under the names that stand in caches of version 0.1: they have moved since.
CLASS_NAMES = {
    "s3prl_ekd.teachers.huggingface.HuggingFaceUpstream": (
        "s3prl_ekd.teacher_sources.hf_folder.HuggingFaceUpstream"
    ),
    "s3prl_ekd.teachers.distilhubert.DistilHubertUpstream": (
        "s3prl_ekd.teacher_sources.distilhubert.DistilHubertUpstream"
    ),
}


def make_key(
    teachers: TeacherEnsemble,
    settings: DistillSettings,
    *,
    aggregated: bool,
    tables: Mapping[str, str],
    sequence_length: int,
    max_timestep: int,
) -> dict[str, Any]:
    """The key of a cache for these settings, of which JSON makes the same again.

    Args:
        teachers: loaded; on any device.
        settings: of the experiment.
        aggregated: the target sets after aggregation; else what each teacher gives.
        tables: name of each corpus table -> digest.
        sequence_length, max_timestep: as in ``pretrain_expert.datarc``.
    """
    answers = _answers(teachers)
    known = {}
    for name, teacher in teachers.items():
        known[name] = {
            "class": upstream_class(teacher.upstream),
            "weights": weights_digest(teacher.upstream),
            "answer": answers[name],
            "targets": [list(target) for target in teacher.targets],
        }
    return {
        "teachers": known,
        "teacher_precision": settings.teacher_precision,
        "contents": aggregation_key(settings) if aggregated else PER_TEACHER,
        "sequence_length": sequence_length,
        "max_timestep": max_timestep,
        "tables": dict(tables),
    }  # the names are PARTS of store.py


def upstream_class(upstream: object) -> str:
    """The class of a teacher's upstream, as a cache's key names it."""
    kind = type(upstream)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return CLASS_NAMES.get(name, name)


def weights_digest(module: nn.Module) -> str:
    """Of all parameters and buffers: names, shapes, types, values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def _answers(teachers: TeacherEnsemble) -> dict[str, list[float]]:
    """The mean absolute value of each target of each teacher, for a second of noise.

    Of the upstreams themselves, in float32, whatever is faster in training.
    """
    noise = 0.1 * torch.randn(PROBE_SAMPLES, generator=torch.Generator().manual_seed(0))
    answers = {}
    for name, teacher in teachers.items():
        device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
        sizes = teacher([noise.to(device)])[0].abs().mean((1, 2))  # [target]
        answers[name] = [float(f"{size:.6g}") for size in sizes.tolist()]
    return answers


def aggregation_key(settings: DistillSettings) -> dict[str, Any]:
    """All that the target sets of an aggregation depend on, beside the teachers."""
    return {  # keys of version 0.1, as in the caches of users
        "aggregation": settings.aggregation,
        "weights": {name: teacher.weight for name, teacher in settings.teachers.items()},
        "separate_heads": settings.heads.per_teacher,
        "across_teachers": settings.targets.across_teachers,
        "residual_heads": settings.heads.residual,
    }


def check_aggregated(settings: DistillSettings) -> None:
    """Refuse to store aggregated targets where they are not the same at each step.

    Raises:
        ConfigError: naming the setting.
    """
    targets = settings.targets
    for word, on in (
        ("teachers.NAME.final_weight", any(_moves(t) for t in settings.teachers.values())),
        ("target_norm", settings.target_norm != "none"),
        ("targets.drop_teachers", targets.drop_teachers > 0),
        ("loss.agreement", settings.loss.agreement < 1),
        ("unit_loss", settings.unit_loss.file is not None),
    ):
        if on:
            raise ConfigError(
                f"aggregated targets cannot be stored with {word}, which needs each teacher's own "
                "at each step; build without --aggregated"
            )


def check_worth(settings: DistillSettings) -> None:
    """Refuse aggregated targets that are nothing but each teacher's own. Raises ConfigError."""
    if settings.aggregation == "separate" and not (
        settings.targets.across_teachers or settings.heads.residual
    ):
        raise ConfigError(
            f"--aggregated: with aggregation {settings.aggregation} the targets are each teacher's "
            "own; leave it out"
        )


def _moves(teacher: TeacherSettings) -> bool:
    return teacher.final_weight is not None and teacher.final_weight != teacher.weight


def layout_of(teachers: TeacherEnsemble, specs: Mapping | None) -> Layout:
    """The blocks: of each teacher, or of each target set where ``specs`` names these."""
    if specs is not None:
        return tuple(Block(name, spec.layers, spec.width) for name, spec in specs.items())
    shapes = teachers.shapes
    return tuple(Block(name, len(s.targets), s.width) for name, s in shapes.items())


def same_key(one: Mapping, other: Mapping) -> str | None:
    """Where two keys differ, in words, or None: for a build that goes on."""
    one = {**one, "contents": _contents(one)}
    for part in ("sequence_length", "max_timestep", "teacher_precision", "contents", "tables"):
        if one.get(part) != other.get(part):
            return f"{part} is {other.get(part)} and was {one.get(part)}"
    if list(one["teachers"]) != list(other["teachers"]):
        return f"the teachers are {_list(other['teachers'])} and were {_list(one['teachers'])}"
    for name, teacher in other["teachers"].items():
        difference = _other_teacher(name, one["teachers"][name], teacher)
        if difference or one["teachers"][name]["targets"] != teacher["targets"]:
            return difference or f"teachers.{name} has other layers"
    return None


def fitting_part(
    index: Index, wanted: Mapping[str, Any], rows: Sequence[Utterance]
) -> tuple[Part | None, str]:
    """The share of a cache that a run reads, or None and in words what does not fit.

    A run may do with fewer teachers, layers or tables than the cache has; aggregated targets
    must be of just its teachers and layers.

    Args:
        index: of the cache.
        wanted: the run's :func:`make_key`.
        rows: the run's utterances.
    """
    key, aggregated = index.key, index.key["contents"] != PER_TEACHER
    if _contents(key) != wanted["contents"]:
        return None, _other_contents(_contents(key), wanted["contents"])
    parts: dict[str, Sequence[int]] = {}
    for name, teacher in wanted["teachers"].items():
        if name not in key["teachers"]:
            return None, f"there is no teacher {name} in it; it has {_list(key['teachers'])}"
        stored = key["teachers"][name]
        difference = _other_teacher(name, stored, teacher)
        if difference:
            return None, difference
        missing = [target for target in teacher["targets"] if target not in stored["targets"]]
        if missing:
            return None, (
                f"teachers.{name} has no target of layer {_layers(missing[0])} in it; it has "
                f"{', '.join(map(_layers, stored['targets']))}"
            )
        parts[name] = [stored["targets"].index(target) for target in teacher["targets"]]
    if aggregated and (
        list(wanted["teachers"]) != list(key["teachers"])
        or any(wanted["teachers"][n]["targets"] != t["targets"] for n, t in key["teachers"].items())
    ):
        return None, "it holds the aggregate of other teachers or layers"
    if key["teacher_precision"] != wanted["teacher_precision"]:
        return None, (
            f"teacher_precision is {wanted['teacher_precision']} and was "
            f"{key['teacher_precision']} when it was built"
        )
    difference = _other_corpus(index, wanted, rows)
    if difference:
        return None, difference
    if aggregated:
        parts = {block.name: range(block.targets) for block in index.layout}
    return part_of(index.layout, parts), ""


def _other_corpus(index: Index, wanted: Mapping, rows: Sequence[Utterance]) -> str:
    theirs, ours = index.key["sequence_length"], wanted["sequence_length"]
    if any(used(row, theirs) != used(row, ours) for row in rows):
        return f"sequence_length is {ours} and was {theirs} when it was built"
    stored = set(index.key["tables"].values())
    others = [name for name, digest in wanted["tables"].items() if digest not in stored]
    if others:
        return f"the corpus table {others[0]} is not among those it was built from, or has changed"
    names = set(index.utterances)
    missing = [row.path for row in rows if row.path not in names]
    if missing:
        return (
            f"it lacks {len(missing)} utterances, {missing[0]} the first (max_timestep is "
            f"{wanted['max_timestep']} and was {index.key['max_timestep']} when it was built)"
        )
    return ""


def _other_teacher(name: str, stored: Mapping, wanted: Mapping) -> str:
    for part, word in (("weights", "weights"), ("class", "code")):
        if stored[part] != wanted[part]:
            return f"teachers.{name} has other {word} than the teacher it was built with"
    pairs = [
        (stored["answer"][stored["targets"].index(target)], value)
        for target, value in zip(wanted["targets"], wanted["answer"], strict=True)
        if target in stored["targets"]
    ]
    if not all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in pairs):
        return f"teachers.{name} answers otherwise than the teacher it was built with"
    return ""


def _contents(key: Mapping) -> Any:
    """What the cache of a key stores; version 0.1 wrote `groups` for some `separate` ones."""
    contents = key["contents"]
    if isinstance(contents, Mapping) and contents.get("aggregation") == "groups":
        return {**contents, "aggregation": "separate"}
    return contents


def _other_contents(stored: Any, wanted: Any) -> str:
    if not isinstance(stored, Mapping):
        return f"it holds the targets {stored}"
    differing = [part for part in wanted if stored.get(part) != wanted[part]]
    shown = ", ".join(f"{part} is {wanted[part]} and was {stored.get(part)}" for part in differing)
    return f"it holds aggregated targets, and {shown}"


def _layers(target: Sequence[int]) -> str:
    return "+".join(map(str, target))


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
