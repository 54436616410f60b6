"""Pretrain with several model configs and seeds, and tabulate the results."""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.settings import DataSettings
from ..distill.settings import RelationSettings
from ..distill.student_settings import FileSettings
from ..errors import DataError, SetupError
from ..files.atomic import file_sha256, make_folder, write_text
from ..files.config import to_plain_data
from ..files.formats import check_format_version
from ..files.renamed_keys import MODEL, RUNNER, restore_keys
from ..files.text import read_json
from ..request import PretrainRequest
from ..system.jobs import Jobs
from .config_diff import changed_sources, source_digests, table_digests
from .curves import read_scalars, teacher_curves
from .settings import load_model_config, load_runner_config

# (section, key, default) of model settings that version 0.1 lacks
_SINCE_0_1: tuple[tuple[str, str, Any], ...] = (
    ("", "pruning", None),
    ("", "relation", to_plain_data(RelationSettings())),
    ("", "teacher_masked_norm", False),
    ("heads", "share", None),
    ("heads", "of_group", "mean"),
    ("loss", "weight", 1.0),
    ("student", "mask", None),
    ("student", "train_extractor", True),
    ("student", "masked_norm", False),
)
# In a run's folder: its digest, digests of the files that it reads (not in earlier versions), and
# its duration once it is finished.
RECORD = "sweep.json"
OLD_ROOT, OLD_RECORD = Path("result/matrix"), "matrix.json"  # of version 0.1


@dataclass(frozen=True)
class SweepRun:
    """One model config with one seed."""

    config: Path  # the model config
    runner: Path  # the runner config
    seed: int
    overrides: str

    @property
    def name(self) -> str:
        return f"{self.config.stem}-seed{self.seed}"

    @property
    def digest(self) -> str:
        """SHA-256 of everything the result depends on: both configs, overrides and seed.

        The configs have the keys of version 0.1, so that results of that version are found.
        """
        return self.digests[0]

    @property
    def digests(self) -> tuple[str, ...]:
        """:attr:`digest`, and those of earlier versions: with ``aggregation: groups``, if every
        teacher has groups of layers, and without the contents of unit files.
        """
        settings = load_model_config(self.config)
        model = restore_keys(to_plain_data(settings), MODEL)
        model.pop("student_backend")  # both backends give equal results; not a key of 0.1
        _drop_new_defaults(model)
        if isinstance(settings.student, FileSettings):
            file = settings.student.file
            model["student"]["sha256"] = _file_digest(file, "student.file")
        models = [model]
        grouped = all(teacher.groups is not None for teacher in settings.teachers.values())
        if settings.aggregation == "separate" and grouped:
            models.append({**model, "aggregation": "groups"})
        settings_of_run = load_runner_config(self.runner, self.overrides)
        accumulates = settings_of_run.runner.gradient_accumulate_steps > 1
        # with one batch per step both are equal; version 0.1 had `batches`
        if not (accumulates or settings.loss.feature_penalty) or settings.loss.reduce == "batches":
            model["loss"].pop("reduce")
        runner = restore_keys(to_plain_data(settings_of_run), RUNNER)
        data = runner["pretrain_expert"]["datarc"]
        if data["shar_streams"] == DataSettings.shar_streams:  # not a key of 0.1
            data.pop("shar_streams")
        facts: list[list[Any]] = [[m, runner, self.seed] for m in models]
        if settings.unit_loss:
            units = [_file_digest(unit.file, "unit_loss") for unit in settings.unit_loss]
            facts.insert(0, [*facts[0], units])
        texts = (json.dumps(fact, sort_keys=True, default=str) for fact in facts)
        return tuple(hashlib.sha256(text.encode()).hexdigest() for text in texts)

    def files(self) -> dict[str, str]:
        """Digests of length tables, teachers and units, by path or key; without missing tables."""
        data = load_runner_config(self.runner, self.overrides).pretrain_expert.datarc
        tables: dict[str, str] = {}
        for name in (*data.sets, *data.dev_sets):
            with contextlib.suppress(DataError):  # finished runs do not need it
                digest = table_digests(data.file_path, [name])[name]
                tables[str(Path(data.file_path) / name)] = digest
        return tables | source_digests(load_model_config(self.config))

    @property
    def folder(self) -> Path:
        """Folder of the run: that of version 0.1 if it exists, else ``result/sweep/NAME``."""
        old = OLD_ROOT / self.name
        return old if (old / OLD_RECORD).is_file() else Path("result/sweep") / self.name

    @property
    def record(self) -> Path:
        return self.folder / (OLD_RECORD if self.folder.parent == OLD_ROOT else RECORD)

    @property
    def argv(self) -> list[str]:
        """The command's arguments."""
        return PretrainRequest(
            upstream="ekd",
            expdir=str(self.folder),
            auto_resume=True,
            config=str(self.runner),
            upstream_config=str(self.config),
            seed=self.seed,
            override=self.overrides or None,
        ).command()


@dataclass(frozen=True)
class SweepResult:
    """The last scalars of a finished run, and its duration.

    ``distances`` are the reconstruction error for each teacher, averaged over its layers.
    """

    loss: float
    distances: Mapping[str, float]
    seconds: float


def run_sweep(runs: Sequence[SweepRun], jobs: int = 1) -> list[SweepResult]:
    """Start or resume unfinished runs, ``jobs`` in parallel; the results are in their order.

    Raises:
        SetupError: runs failed, or a folder holds a run of the same name with other settings or
            with other contents of the files that it reads.
    """
    all_files: dict[tuple[Path, Path, str], dict[str, str]] = {}  # equal for all seeds
    for run in runs:
        key = (run.config, run.runner, run.overrides)
        all_files[key] = files = all_files.get(key) or run.files()
        if not run.record.is_file():
            continue
        record = _read(run.record)
        if record["digest"] not in run.digests:
            raise SetupError(
                f"{run.folder} holds a run with other settings; move or remove the folder"
            )
        if changed := changed_sources(record.get("files", {}), files):
            raise SetupError(
                f"{run.folder} holds a run with other files: since then {', '.join(changed)} "
                "changed; restore them, or move or remove the folder"
            )
    processes = Jobs(jobs)

    def start(run: SweepRun, environment: Mapping[str, str]) -> SweepResult:
        files = all_files[run.config, run.runner, run.overrides]
        return _run(run, files, processes, environment)

    return processes.run_all(start, runs)


def _run(
    run: SweepRun, files: Mapping[str, str], processes: Jobs, environment: Mapping[str, str]
) -> SweepResult:
    if not run.record.is_file() or "seconds" not in _read(run.record):
        make_folder(run.folder, SetupError)
        content: dict[str, Any] = {"digest": run.digest, "files": files}
        write_text(run.record, json.dumps(content))
        start = time.monotonic()
        processes.run(run.argv, run.folder / "log.txt", environment)
        content["seconds"] = time.monotonic() - start
        write_text(run.record, json.dumps(content))
    return read_result(run)


def _file_digest(path: str, key: str) -> str:
    """SHA-256 of a file's contents. Raises SetupError, with the config key that names it."""
    try:
        return file_sha256(path)
    except OSError as error:
        raise SetupError(f"{key}: cannot read {path}: {error.strerror}") from None


def _drop_new_defaults(model: dict[str, Any]) -> None:
    """Remove settings that version 0.1 lacks if they have the defaults, which change nothing."""
    for section, name, default in _SINCE_0_1:
        settings = model[section] if section else model
        if settings.get(name) == default:
            settings.pop(name, None)


def _read(record: Path) -> dict:
    data = read_json(record, "record", SetupError)
    check_format_version(data.get("format", 1), 1, f"the record {record}", SetupError)
    if not isinstance(data.get("digest"), str) or not isinstance(data.get("files", {}), dict):
        raise SetupError(f"{record} is damaged: no digest; remove the folder and run again")
    return data


def read_result(run: SweepRun) -> SweepResult:
    """Read the last scalars of a finished run."""
    scalars = read_scalars(run.folder)
    distances = {
        teacher: statistics.fmean(_last(points) for points in layers.values())
        for teacher, layers in teacher_curves(scalars).items()
    }
    loss = _last(scalars["ekd/train-loss_mean"])
    return SweepResult(loss, distances, _read(run.record)["seconds"])


def _last(points: Mapping[int, float]) -> float:
    return points[max(points)]


def results_table(results: Mapping[str, Sequence[SweepResult]]) -> list[list[str]]:
    """Rows of text, the first the header: mean ± standard deviation over the seeds.

    Args:
        results: experiment -> a result for each seed.
    """
    all_results = [result for group in results.values() for result in group]
    teachers = list(dict.fromkeys(name for result in all_results for name in result.distances))
    rows = [
        ["experiment", "seeds", "loss", *(f"distance to {name}" for name in teachers), "seconds"]
    ]
    for name, group in results.items():
        cells = [name, str(len(group)), _spread([result.loss for result in group])]
        for teacher in teachers:
            values = [r.distances[teacher] for r in group if teacher in r.distances]
            cells.append(_spread(values) if values else "")
        rows.append([*cells, f"{statistics.fmean(result.seconds for result in group):.0f}"])
    return rows


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean
