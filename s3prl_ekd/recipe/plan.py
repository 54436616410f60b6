"""The plan of ``s3prl-ekd recipe``: its students, and the command of each stage, as typed."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..distill.student_settings import CopySettings
from ..downstream.tasks import DEFAULT_TASKS, choose_tasks
from ..errors import SetupError
from ..files.config import override_value
from ..files.run_checkpoints import newest_step
from ..pretrain.settings import ModelFile, RunnerFile, load_model_config, load_runner_config
from ..request import PretrainRequest
from ..system.torchrun import torchrun_command
from ..workspace import (
    PREPARED_LIBRISPEECH,
    Schedule,
    write_workspace,
)

RECIPES = {
    "ekd960": "three Base teachers, LibriSpeech 960 h: single teachers, average, concatenation, "
    "heads, average and heads, a pruned student; PR, SID, ER, ASR; a report"
}
# Experiments of pretrain_configs/experiments: a student each.
ROWS = {
    "single_hubert": "HuBERT alone, the baseline (DistilHuBERT)",
    "single_robust": "RobustHuBERT alone",
    "single_wavlm": "WavLM Base+ alone",
    "three_average": "average of three teachers",
    "three_concat": "concatenation of three teachers",
    "three_separate": "heads for each of three teachers",
    "three_average_heads": "heads for the average and for each teacher",
    "ekd_pruned_average": "average of three teachers, a copy of HuBERT that is pruned (DPHuBERT)",
    "dp_hubert": "HuBERT alone, a copy that is pruned: the control of ekd_pruned_average",
}
DEFAULT_ROWS = tuple(ROWS)[:-1]
PRUNING_PROCESSES = 4  # pruning_runner.yaml gives the batch of each of four processes
UTTERANCE = 12.3  # seconds, mean of LibriSpeech 960 h (DistilHuBERT, arXiv 2110.01900, section 3)
VOXCELEB1_SPLIT = "iden_split.txt"


@dataclass(frozen=True)
class RecipeOptions:
    """The options of the command.

    Attributes:
        folder: the working folder.
        librispeech, voxceleb1, iemocap, lexicon: absolute paths.
        g2p: whether pronunciations that no lexicon has are predicted.
        rows: names of :data:`ROWS`.
        seeds: of the distillations.
        gpus: GPUs of one training, through torchrun.
        jobs: students at a time, a GPU each.
        steps: of every training, for a rehearsal; None for the configs' steps.
        tiny: distil the tiny teachers into tiny students, for a rehearsal.
    """

    folder: Path
    librispeech: Path
    voxceleb1: Path | None = None
    iemocap: Path | None = None
    lexicon: Sequence[Path] = ()
    g2p: bool = False
    rows: Sequence[str] = DEFAULT_ROWS
    seeds: Sequence[int] = (1337,)
    tasks: Sequence[str] = ("pr", "sid", "er", "asr")
    gpus: int = 1
    jobs: int = 1
    steps: int | None = None
    tiny: bool = False

    def check(self) -> None:
        """Raise SetupError for a value that is not possible."""
        for row in self.rows:
            if row not in ROWS:
                raise SetupError(f"--rows: no such row {row!r}; expected: {', '.join(ROWS)}")
        for option, values in (("rows", self.rows), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise SetupError(f"--{option} must differ, got {' '.join(map(str, values))}")
        if min(self.gpus, self.jobs) != 1:
            raise SetupError(
                "--gpus (of one training) and --jobs (students at a time) must be 1 or more, and "
                f"one of them 1, got {self.gpus} and {self.jobs}"
            )
        if self.steps is not None and self.steps < 2:
            raise SetupError(f"--steps must be 2 or more, got {self.steps}")


@dataclass(frozen=True)
class Stage:
    """One command, run in the working folder.

    Attributes:
        name: also of its log.
        argv: the command, see :func:`..system.jobs.child_command`.
        result: the file that shows that the stage is done; empty for one that always runs, because
            its command skips what is done or takes seconds. A stage before the distillations runs
            again if its command has changed.
    """

    name: str
    argv: Sequence[str]
    result: str = ""

    def is_done(self, folder: Path) -> bool:
        """Whether the result is in the working folder."""
        return bool(self.result) and (folder / self.result).is_file()


@dataclass(frozen=True)
class Training(Stage):
    """A distillation; ``result`` is the run's folder.

    Attributes:
        steps: updates.
        audio: seconds of audio in an update, of all processes.
        teachers: their number.
        student: ``two layers``, ``copy`` (of a teacher) or ``pruned``.
        targets: sets of prediction heads.
        checkpoints: most that are kept, with ``last.ckpt``.
    """

    steps: int = 0
    audio: float = 0.0
    teachers: int = 1
    student: str = "two layers"
    targets: int = 1
    checkpoints: int = 1

    def is_done(self, folder: Path) -> bool:
        """Whether the run has a checkpoint of its last step."""
        return newest_step(folder / self.result) >= self.steps


@dataclass(frozen=True)
class RecipePlan:
    """The stages in the order in which they run; the students are independent of each other."""

    options: RecipeOptions
    models: Mapping[str, ModelFile]  # row -> model config
    sets: Sequence[str]  # length tables of the distillations
    setup: Sequence[Stage]
    students: Mapping[str, Sequence[Stage]]  # name -> its stages
    report: Stage

    @property
    def stages(self) -> list[Stage]:
        """All stages."""
        return [*self.setup, *(s for stages in self.students.values() for s in stages), self.report]


def make_plan(options: RecipeOptions) -> RecipePlan:
    """Plan the stages. Configs that the working folder has already are read there.

    Raises:
        SetupError: an option is not possible.
        ConfigError: a config in the working folder is not valid.
    """
    options.check()
    tasks = [task.name for task in choose_tasks(options.tasks, DEFAULT_TASKS)]
    options = replace(options, tasks=tasks)
    kind = "tiny" if options.tiny else "experiments"
    experiments = {row: f"pretrain/ekd/{kind}/{row}.yaml" for row in options.rows}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if (existing := options.folder / "pretrain").is_dir():
            shutil.copytree(existing, root / "pretrain")
        write_workspace(root, [f"{kind}/{row}" for row in options.rows])
        models = {row: load_model_config(root / path) for row, path in experiments.items()}
        runners = {
            path: load_runner_config(root / path)
            for path in map(_runner_path, models.values(), [options.tiny] * len(models))
        }
    students = {
        f"{row}-seed{seed}": _student(options, row, seed, model, experiments[row], runners)
        for row, model in models.items()
        for seed in options.seeds
    }
    report = ["report", "result/superb", "-o", "report", "--published", "--against"]
    return RecipePlan(
        options,
        models,
        list(dict.fromkeys(name for run in runners.values() for name in _sets(options, run))),
        _setup(options),
        students,
        Stage("report", [*report, next(iter(students))]),
    )


def _setup(options: RecipeOptions) -> list[Stage]:
    """The stages before the first distillation.

    ``init`` gets no path of VoxCeleb1 and IEMOCAP: the recipes read the links that ``prepare``
    makes, so that the corpora can be added later.
    """
    init = ["init", ".", "--librispeech", str(options.librispeech)]
    tables = ["prepare", "librispeech", str(options.librispeech), "-o", PREPARED_LIBRISPEECH]
    if "pr" in options.tasks:
        tables += ["--lexicon", *map(str, options.lexicon)] if options.lexicon else []
        tables += ["--g2p"] if options.g2p else []
    result = "lexicon.txt" if "pr" in options.tasks else "prepared.tsv"
    stages = [
        # a folder of tables without a lexicon is replaced if PR is added
        Stage("prepare-librispeech", [*tables, "--replace"], f"{PREPARED_LIBRISPEECH}/{result}")
    ]
    for corpus, task, path, more in (
        ("voxceleb1", "sid", options.voxceleb1, [f"{options.voxceleb1}/{VOXCELEB1_SPLIT}"]),
        ("iemocap", "er", options.iemocap, []),
    ):
        if path is None or task not in options.tasks:
            continue
        argv = ["prepare", corpus, str(path), *more, "-o", f"data/{corpus}", "--replace"]
        stages.append(Stage(f"prepare-{corpus}", argv, f"data/{corpus}/prepared.tsv"))
    for row in options.rows:
        init += ["-x", row]
    check = Stage("check-tasks", ["superb", "fbank", "--tasks", *options.tasks, "--dry-run"])
    return [Stage("init", [*init, *["--tiny"] * options.tiny]), *stages, check]


def _student(
    options: RecipeOptions,
    row: str,
    seed: int,
    model: ModelFile,
    experiment: str,
    runners: Mapping[str, RunnerFile],
) -> list[Stage]:
    """The stages of one student: distil, (prune, distil again,) export, evaluate."""
    name, path = f"{row}-seed{seed}", _runner_path(model, options.tiny)
    changes = _changes(options, runners[path])
    first = _training(options, name, experiment, path, seed, runners[path], changes, model)
    stages: list[Stage] = [first]
    trained = name
    if model.pruning is not None:
        run = runners[path].runner
        schedule = Schedule(first.steps, int(changes.get("runner.save_step", run.save_step)))
        schedule = replace(schedule, lr=float(runners[path].optimizer["lr"]))
        pruned, trained = f"{name}-pruned", f"{name}-final"
        argv = ["prune", f"result/pretrain/{name}", "-o", f"{pruned}.pt", "--force"]
        # prune writes the model config last
        stages.append(Stage(f"{name}-prune", argv, f"{pruned}.yaml"))
        changes = {**changes, **schedule.second()}
        second = _training(
            options, trained, f"{pruned}.yaml", path, seed, runners[path], changes, model
        )
        stages.append(replace(second, student="pruned"))
    file = f"{name}.safetensors"
    argv = [
        "export",
        "student",
        f"result/pretrain/{trained}",
        "-o",
        file,
        "--heads",
        "drop",
        "--force",
    ]
    stages.append(Stage(f"{name}-export", argv, file))
    argv = ["superb", file, "--tasks", *options.tasks, "--jobs", str(options.gpus)]
    argv += ["--steps", str(options.steps)] if options.steps else []
    return [*stages, Stage(f"{name}-superb", argv)]


def _training(
    options: RecipeOptions,
    name: str,
    config: str,
    path: str,
    seed: int,
    run: RunnerFile,
    changes: Mapping[str, Any],
    model: ModelFile,
) -> Training:
    override = ",,".join(f"config.{key}={override_value(v)}" for key, v in changes.items())
    request = PretrainRequest(
        upstream="ekd",
        expname=name,
        auto_resume=True,
        config=path,
        upstream_config=config,
        seed=seed,
        override=override or None,
    )
    steps = int(changes.get("runner.total_steps", run.runner.total_steps))
    saved = steps // int(changes.get("runner.save_step", run.runner.save_step))
    heads = model.aggregation != "average" or model.heads.per_teacher
    return Training(
        f"{name}-distil",
        torchrun_command(request.command(), options.gpus),
        f"result/pretrain/{name}",
        steps,
        _audio(run),
        len(model.teachers),
        "copy" if isinstance(model.student, CopySettings) else "two layers",
        len(model.teachers) * heads + (model.aggregation == "average"),
        min(saved, run.runner.max_keep) + 1,
    )


def _runner_path(model: ModelFile, tiny: bool) -> str:
    if model.pruning is not None:
        return f"pretrain/ekd/{'tiny_' * tiny}pruning_runner.yaml"
    return f"pretrain/ekd/{'tiny' if tiny else 'config'}_runner.yaml"


def _sets(options: RecipeOptions, run: RunnerFile) -> Sequence[str]:
    """Length tables of a distillation; a tiny one has the first part of LibriSpeech."""
    return ("train-clean-100",) if options.tiny else run.pretrain_expert.datarc.sets


def _audio(run: RunnerFile) -> float:
    """Seconds of audio in an update."""
    data = run.pretrain_expert.datarc
    if data.max_seconds:
        return data.max_seconds * PRUNING_PROCESSES
    return data.train_batch_size * run.runner.gradient_accumulate_steps * UTTERANCE


def _changes(options: RecipeOptions, run: RunnerFile) -> dict[str, Any]:
    """Dotted keys of the runner config and the values that the options give them.

    An update has the same amount of audio for any number of GPUs.

    Raises:
        SetupError: the batch cannot be divided among the GPUs.
    """
    data, gpus = run.pretrain_expert.datarc, options.gpus
    datarc = "pretrain_expert.datarc"
    changes: dict[str, Any] = {}
    if data.max_seconds:
        accumulated = math.ceil(PRUNING_PROCESSES / gpus)
        if accumulated != run.runner.gradient_accumulate_steps:
            changes["runner.gradient_accumulate_steps"] = accumulated
        if (processes := gpus * accumulated) != PRUNING_PROCESSES:
            changes[f"{datarc}.max_seconds"] = data.max_seconds * PRUNING_PROCESSES // processes
    elif data.train_batch_size % gpus:
        sizes = [n for n in range(1, data.train_batch_size + 1) if data.train_batch_size % n == 0]
        raise SetupError(
            f"--gpus {gpus}: a batch of {data.train_batch_size} utterances is divided among the "
            f"GPUs; expected one of: {', '.join(map(str, sizes))}"
        )
    elif gpus > 1:
        changes[f"{datarc}.train_batch_size"] = data.train_batch_size // gpus
    if options.tiny:
        changes[f"{datarc}.libri_root"] = str(options.librispeech)
        changes[f"{datarc}.file_path"] = f"./{PREPARED_LIBRISPEECH}/len_for_bucket"
        changes[f"{datarc}.sets"] = list(_sets(options, run))
    if options.steps:
        changes["runner.total_steps"] = options.steps
        changes["runner.save_step"] = max(1, options.steps // 2)
        changes["runner.log_step"] = max(1, options.steps // 4)  # less than a second distillation
    return changes
