"""Fingerprint of a target cache, and comparison with a run's settings.

A teacher is identified by its weights, its class and its output for one second of noise, never by
its path: a renamed file is the same teacher, a replaced file is not. The output also
shows what is not in the weights, such as a normalisation of the waveform. It differs a little
between machines, so it is compared with a tolerance. Stored hidden states are identified by a
digest of their folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..data.sampling import used
from ..data.settings import DataSettings
from ..data.tables import Utterance
from ..distill.settings import DistillSettings
from ..distill.teachers import PROBE_SAMPLES, Teacher, TeacherEnsemble
from ..errors import ConfigError, DataError
from ..files.weights_digest import weights_digest
from ..system.devices import module_device
from .store import PER_TEACHER, Index, TargetBlock, TargetLayout, TargetSubset, select_targets

# Field of a key -> the setting that it stores. The fields have names of version 0.1.
SETTINGS = {
    "weights": "teachers.NAME.weight",
    "separate_heads": "heads.per_teacher",
    "across_teachers": "targets.across_teachers",
    "residual_heads": "heads.residual",
}
TOLERANCE = 0.01  # relative, of the output; devices and versions differ by far less (ours)

# Our classes that have moved since version 0.1 -> their names in caches of that version.
CLASS_NAMES = {
    "s3prl_ekd.teachers.huggingface.HuggingFaceUpstream": (
        "s3prl_ekd.teacher_sources.hf_folder.HuggingFaceUpstream"
    ),
    "s3prl_ekd.teachers.distilhubert.DistilHubertUpstream": (
        "s3prl_ekd.teacher_sources.distilhubert.DistilHubertUpstream"
    ),
}


def cache_key(
    teachers: TeacherEnsemble,
    settings: DistillSettings,
    data: DataSettings,
    tables: Mapping[str, str],
    *,
    aggregated: bool,
) -> dict[str, Any]:
    """The fingerprint of a cache for these settings, as JSON data.

    Args:
        tables: name of each length table -> digest.
        aggregated: the cache has aggregated target sets, not each teacher's own targets.
    """
    return {
        "teachers": {
            name: {
                "class": upstream_class(teacher.upstream),
                "weights": weights_digest(teacher.upstream),
                "answer": _probe_output(teacher),
                "targets": [list(target) for target in teacher.targets],
            }
            for name, teacher in teachers.items()
        },
        "teacher_precision": settings.teacher_precision,
        "contents": aggregation_key(settings) if aggregated else PER_TEACHER,
        "sequence_length": data.sequence_length,
        "max_timestep": data.max_timestep,
        "tables": dict(tables),
    }  # store.KEY_FIELDS has these names


def upstream_class(upstream: object) -> str:
    """The name of an upstream's class in a cache's key."""
    cls = type(upstream)
    name = f"{cls.__module__}.{cls.__qualname__}"
    return CLASS_NAMES.get(name, name)


@torch.no_grad()
def _probe_output(teacher: Teacher) -> list[float]:
    """Mean absolute value of each target for one second of noise.

    Computed by the upstream in float32, also if training uses a faster mode. Stored hidden states
    have none of noise, and are identified by their digest alone.
    """
    if hasattr(teacher.upstream, "stated"):
        return [0.0] * len(teacher.targets)
    noise = 0.1 * torch.randn(PROBE_SAMPLES, generator=torch.Generator().manual_seed(0))
    means = teacher([noise.to(module_device(teacher))])[0].abs().mean((1, 2))  # [target]
    return [float(f"{mean:.6g}") for mean in means.tolist()]


def aggregation_key(settings: DistillSettings) -> dict[str, Any]:
    """The settings that aggregated target sets depend on, except the teachers."""
    return {  # keys of version 0.1, as in existing caches
        "aggregation": settings.aggregation,
        "weights": {name: teacher.weight for name, teacher in settings.teachers.items()},
        "separate_heads": settings.heads.per_teacher,
        "across_teachers": settings.targets.across_teachers,
        "residual_heads": settings.heads.residual,
    }


def check_aggregated(settings: DistillSettings) -> None:
    """Reject settings that need each teacher's own targets at each step. Raises ConfigError."""
    targets = settings.targets
    scheduled = any(t.final_weight not in (None, t.weight) for t in settings.teachers.values())
    for key, enabled in (
        ("teachers.NAME.final_weight", scheduled),
        ("target_norm", settings.target_norm != "none"),
        ("targets.drop_teachers", targets.drop_teachers > 0),
        ("loss.agreement", settings.loss.agreement < 1),
        ("unit_loss", bool(settings.unit_loss)),
        ("relation", settings.relation.weight > 0),
    ):
        if enabled:
            raise ConfigError(
                f"aggregated targets cannot be cached with {key}, which needs each teacher's own "
                "targets at each step; build without --aggregated"
            )


def check_aggregation_differs(settings: DistillSettings) -> None:
    """Reject an aggregation that leaves the teachers' targets unchanged. Raises ConfigError."""
    if settings.aggregation == "separate" and not (
        settings.targets.across_teachers or settings.heads.residual
    ):
        raise ConfigError(
            f"--aggregated has no effect: with aggregation {settings.aggregation} the targets are "
            "each teacher's own; remove it"
        )


def target_layout(teachers: TeacherEnsemble, specs: Mapping | None) -> TargetLayout:
    """One block for each teacher, or for each target set if ``specs`` are given."""
    if specs is not None:
        return tuple(TargetBlock(name, spec.layers, spec.width) for name, spec in specs.items())
    shapes = teachers.shapes
    return tuple(TargetBlock(name, len(s.targets), s.width) for name, s in shapes.items())


def check_same_key(stored: Mapping, current: Mapping) -> None:
    """Check that a build that is resumed is of the same cache. Raises DataError: the difference."""
    stored = {**stored, "contents": _contents(stored)}
    for field in ("sequence_length", "max_timestep", "teacher_precision", "contents", "tables"):
        if stored[field] != current[field]:
            raise DataError(f"{field} is {current[field]}, was {stored[field]}")
    if _targets(stored) != _targets(current):
        raise DataError(f"teachers and layers are {_targets(current)}, were {_targets(stored)}")
    for name, teacher in current["teachers"].items():
        _check_teacher(name, stored["teachers"][name], teacher)


def matching_subset(
    index: Index, current: Mapping[str, Any], rows: Sequence[Utterance]
) -> TargetSubset:
    """Select the subset of a cache that a run reads.

    A run may use fewer teachers, layers or tables than the cache has. Aggregated targets must have
    exactly the run's teachers and layers.

    Args:
        index: the index of the cache.
        current: the run's :func:`cache_key`.
        rows: the run's utterances.

    Raises:
        DataError: why the cache does not fit.
    """
    key = index.key
    _check_contents(_contents(key), current["contents"])
    selected: dict[str, Sequence[int]] = {}
    for name, teacher in current["teachers"].items():
        if name not in key["teachers"]:
            raise DataError(f"it has no teacher {name}, only {', '.join(key['teachers'])}")
        stored = key["teachers"][name]
        _check_teacher(name, stored, teacher)
        missing = [target for target in teacher["targets"] if target not in stored["targets"]]
        if missing:
            raise DataError(
                f"teachers.{name}: layer {_layer_names(missing[0])} is not in it, only "
                f"{', '.join(map(_layer_names, stored['targets']))}"
            )
        selected[name] = [stored["targets"].index(target) for target in teacher["targets"]]
    if key["contents"] != PER_TEACHER:
        if _targets(current) != _targets(key):
            raise DataError("its targets are aggregated over different teachers or layers")
        selected = {block.name: range(block.targets) for block in index.layout}
    _check_value("teacher_precision", key, current)
    if any(
        used(row, key["sequence_length"]) != used(row, current["sequence_length"]) for row in rows
    ):
        _check_value("sequence_length", key, current)
    tables = list(key["tables"].values())
    for name, digest in current["tables"].items():
        if digest not in tables:
            raise DataError(
                f"it was not built from the length table {name}, or the table has changed"
            )
    names = set(index.utterances)
    missing_rows = [row.name for row in rows if row.name not in names]
    if missing_rows:
        raise DataError(
            f"{len(missing_rows)} utterances are missing from it, the first is {missing_rows[0]} "
            f"(max_timestep is {current['max_timestep']}; the cache was built with "
            f"{key['max_timestep']})"
        )
    return select_targets(index.layout, selected)


def _targets(key: Mapping) -> list[tuple[str, list]]:
    """The teachers, in order, with their targets."""
    return [(name, teacher["targets"]) for name, teacher in key["teachers"].items()]


def _check_value(field: str, stored: Mapping, current: Mapping) -> None:
    if stored[field] != current[field]:
        raise DataError(f"{field} is {current[field]}; the cache was built with {stored[field]}")


def _check_teacher(name: str, stored: Mapping, current: Mapping) -> None:
    for field in ("weights", "class"):
        if stored.get(field) != current[field]:
            raise DataError(f"teachers.{name}: different {field} than when the cache was built")
    for target, output in zip(current["targets"], current["answer"], strict=True):
        if target in stored["targets"]:
            stored_output = stored["answer"][stored["targets"].index(target)]
            if not math.isclose(stored_output, output, rel_tol=TOLERANCE):
                raise DataError(f"teachers.{name}: different output than when the cache was built")


def _contents(key: Mapping) -> Any:
    """The ``contents`` of a key, with ``aggregation: groups`` of version 0.1 as ``separate``."""
    contents = key["contents"]
    if isinstance(contents, Mapping) and contents.get("aggregation") == "groups":
        return {**contents, "aggregation": "separate"}
    return contents


def _check_contents(stored: Any, current: Any) -> None:
    if stored == current:
        return
    if not isinstance(stored, Mapping) or not isinstance(current, Mapping):
        raise DataError(f"its targets are {stored}, this run's {current}")
    values = ", ".join(
        f"{SETTINGS.get(field, field)} is {value}, was {stored.get(field)}"
        for field, value in current.items()
        if stored.get(field) != value
    )
    raise DataError(f"its targets are aggregated and {values}")


def _layer_names(target: Sequence[int]) -> str:
    return "+".join(map(str, target))
