"""The metadata of a model card, which the Hugging Face Hub reads: YAML at the top of README.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PureWindowsPath
from typing import Any

from ..downstream.tasks import COLUMNS
from ..errors import ConfigError
from ..superb.metrics import TaskMetric
from ..teachers.published import hub_repository

# Names of LibriSpeech's parts for training; `prepare asr` and the demo name any corpus train-clean.
_LIBRISPEECH = {"train-clean-100", "train-clean-360", "train-other-500"}
_METRICS = {"per": "per", "wer": "wer", "acc": "accuracy"}  # -> name on the Hub


@dataclass(frozen=True)
class CardFacts:
    """What a card says besides the student file.

    Attributes:
        license: an identifier of the Hub, such as ``apache-2.0``.
        datasets: ids of the training data on the Hub.
        language: language codes, such as ``en``.
        metrics: SUPERB task -> result on the test set.
        repository: ``ORG/NAME`` on the Hub, for the card's example; None for a folder.
    """

    license: str | None = None
    datasets: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    metrics: Mapping[str, TaskMetric] = field(default_factory=dict)
    repository: str | None = None

    def __post_init__(self) -> None:
        for option, values, pattern, example in (
            ("--license", (self.license,), r"[a-z0-9][a-z0-9.-]*", "apache-2.0"),
            ("--dataset", self.datasets, r"[\w.-]+(/[\w.-]+)?", "openslr/librispeech_asr"),
            ("--language", self.language, r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual", "en"),
        ):
            for value in values:
                if value is not None and not re.fullmatch(pattern, value, re.ASCII):
                    raise ConfigError(
                        f"{option} must be an identifier like {example}, got {value!r}"
                    )


def front_matter(about: Mapping[str, Any], name: str, model_type: str, facts: CardFacts) -> str:
    """The metadata as YAML, without the lines of dashes around it.

    ``base_model`` are the teachers that are on the Hub, found in ``about`` of the student file.
    Data and language are those of LibriSpeech if the run's tables are those of its training parts.
    """
    from huggingface_hub import EvalResult, ModelCardData

    trained_on = {name for part in _trainings(about) for name in _sets(part)}
    is_librispeech = bool(trained_on) and trained_on <= _LIBRISPEECH
    datasets = facts.datasets or (("openslr/librispeech_asr",) if is_librispeech else ())
    language = facts.language or (("en",) if is_librispeech else ())
    results = [
        EvalResult(
            task_type=COLUMNS[column].task.hub_type,
            task_name=COLUMNS[column].task.full_name,
            dataset_type="other",  # the recipe's name does not say that the corpus is SUPERB's
            dataset_name=f"{_recipe(metric)}, {COLUMNS[column].task.split}",
            metric_type=_METRICS.get(COLUMNS[column].metric.name, COLUMNS[column].metric.name),
            metric_name=f"{COLUMNS[column].metric.name.upper()}, per cent",
            metric_value=round(metric.value, 2),
        )
        for column, metric in facts.metrics.items()
    ]
    data = ModelCardData(
        license=facts.license,
        base_model=_base_models(about) or None,
        datasets=list(datasets) or None,
        language=list(language) or None,
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["speech", model_type, "distillation"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def score_rows(metrics: Mapping[str, TaskMetric]) -> list[list[str]]:
    """A table of results for a card, with a head."""
    rows = [["task", "metric", "per cent", "95 % interval", "test set", "seeds", "recipe"]]
    for name, metric in metrics.items():
        low, high = metric.interval
        column, runs = COLUMNS[name], metric.selection
        row = [f"{column.task.name.upper()}: {column.task.full_name}", column.metric.name.upper()]
        row += [f"{metric.value:.2f}", f"{low:.2f} to {high:.2f}"]
        row.append(f"{metric.units} {column.task.unit}")
        rows.append([*row, str(len(runs.seeds)), f"`{_recipe(metric)}`"])
    return rows


def _recipe(metric: TaskMetric) -> str:
    """The path of a recipe that `init` writes, or the name of another file: folders of the user's
    machine stay private."""
    recipe = metric.selection.runs[0].recipe
    task = COLUMNS[metric.column].task
    known = (task.full, task.tiny)
    return recipe if recipe in known else PureWindowsPath(recipe).name  # splits at / and \


def _trainings(about: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """``about`` of the student, or of each student whose average it is."""
    members = about.get("merged")
    if not isinstance(members, list):
        yield about
        return
    for member in members:
        part = member.get("about") if isinstance(member, Mapping) else None
        if isinstance(part, Mapping):
            yield part


def _base_models(about: Mapping[str, Any]) -> list[str]:
    """Repositories of the teachers, each once, in order."""
    found: dict[str, None] = {}
    for part in _trainings(about):
        config = part.get("config")
        teachers = config.get("teachers") if isinstance(config, Mapping) else None
        for teacher in teachers.values() if isinstance(teachers, Mapping) else ():
            model = teacher.get("model") if isinstance(teacher, Mapping) else None
            if isinstance(model, str) and (repository := hub_repository(model)):
                found[repository] = None
    return list(found)


def _sets(about: Mapping[str, Any]) -> list[str]:
    """Names of the length tables of a run."""
    data = about.get("data")
    sets = data.get("sets") if isinstance(data, Mapping) else None
    return [name for name in sets if isinstance(name, str)] if isinstance(sets, list) else []
