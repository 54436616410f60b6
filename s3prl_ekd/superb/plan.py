"""Plan the runs of `s3prl-ekd superb`: upstreams × tasks × learning rates × seeds × folds."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from ..compat.no_eval import run_splits
from ..compat.source import may_be_upstream
from ..downstream.tasks import DEFAULT_TASKS, TASKS, Task, choose_tasks, missing_paths, recipe_paths
from ..downstream.tasks.corpus_check import check_corpus
from ..downstream.tasks.lookup import EXPERT, check_override_keys
from ..errors import ConfigError, SetupError
from ..files.atomic import file_sha256
from ..files.config import (
    apply_overrides,
    argument_overrides,
    from_plain_data,
    override_value,
    read_yaml,
    value_at,
)
from ..files.hub import parse_hub_id
from ..prepare.common import PREPARED
from ..request import (
    CACHE,
    CacheOptions,
    DownstreamRequest,
    NoisyTest,
    condition_name,
    parse_cache_options,
)
from ..teachers import zoo
from ..teachers.student_source import check_student, contents_sha256, is_student_folder, pin_student
from .results import CLEAN, UNTRAINED, DevMetric, RunRecord

SEARCH = "search"  # --lr search
SEED = 1337  # by default
FEATURES = ".features"  # cached hidden states, in the output folder
_DATA = f"{EXPERT}.datarc"
_JOINED = {"--override": ",,", "--lr": ","}  # options that are joined if given several times
_NAME = r"[\w.-]+"  # an upstream's name, also the name of its folder


@dataclass(frozen=True)
class Upstream:
    """An upstream to evaluate: a name in ``s3prl.hub``, and a checkpoint if it needs one."""

    name: str  # shown in reports; also the folder's name
    hub: str
    checkpoint: str | None = None
    selection: str = "hidden_states"  # key of the outputs that the featurizer uses

    @property
    def identity(self) -> list[str]:
        """Hub name, SHA-256 of the checkpoint's contents (its id or path if that is unknown),
        selection."""
        path = self.checkpoint
        if path is None and self.hub in zoo.NAMES:  # weights that change with the package's version
            path = str(zoo.checkpoint_path(self.hub))
        is_contents = path is not None and (
            Path(path).is_file() or Path(path, "config.json").is_file()
        )
        contents = _sha256(Path(path or "")) if is_contents else str(path)
        return [self.hub, contents, self.selection]

    @property
    def digest(self) -> str:
        return _digest(self.identity)


_sha256 = cache(contents_sha256)  # every run of an upstream needs it


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def parse_upstream(text: str, selection: str = "hidden_states") -> Upstream:
    """Parse ``STUDENT``, ``HUB``, ``NAME=STUDENT``, ``NAME=HUB`` or ``NAME=HUB:CHECKPOINT``.

    STUDENT is all that :func:`.find_student` takes; a run's folder and an id on the Hugging Face
    Hub are pinned. Paths may contain ``=``: an existing one is never split, and the part before the
    first ``=`` is a name only if it is a valid one.
    """
    name, equals, source = text.partition("=")
    if not equals or Path(text).exists() or not re.fullmatch(_NAME, name):
        name, source = "", text
    hub, colon, checkpoint = source.partition(":")
    if _is_student(source):
        pinned = pin_student(source, text)
        upstream = Upstream(name or _name_from(source), "ekd_student", pinned, selection)
    elif colon and not source.startswith(("http://", "https://")):
        default_name = f"{hub}-{_name_from(checkpoint)}"
        if hub.startswith("ekd_student"):
            checkpoint = pin_student(checkpoint, text)
            check_student(checkpoint, text)
        elif Path(checkpoint).exists():
            selection = "hidden_states"
        else:
            hint = f"; for a model of the Hugging Face Hub, leave out {hub}:"
            is_id = parse_hub_id(checkpoint) is not None
            raise SetupError(f"{text}: no such file: {checkpoint}{hint if is_id else ''}")
        upstream = Upstream(name or default_name, hub, checkpoint, selection)
    elif re.fullmatch(r"\w+", source):
        if not may_be_upstream(source):
            raise SetupError(f"{text}: no such upstream in s3prl; see run_downstream.py -h")
        if source.startswith("ekd_student"):
            raise SetupError(f"{text}: give the student's file, run or folder instead")
        upstream = Upstream(name or source, source)
    else:
        raise SetupError(
            f"{text}: no such file; UPSTREAM must be a student (a file, a run's folder, a Hugging "
            "Face folder or ORG/NAME on the Hugging Face Hub), a name of s3prl's hub, "
            "NAME=student.pt or NAME=HUB:CHECKPOINT"
        )
    if not re.fullmatch(_NAME, upstream.name) or upstream.name.startswith("."):
        raise SetupError(
            f"{text}: a name must consist of letters, digits, _ - . (not first), got "
            f"{upstream.name!r}"
        )
    return upstream


def _is_student(source: str) -> bool:
    """Whether a text is a student, and not a name of s3prl's hub, which may also be a folder's."""
    path = Path(source)
    if path.is_dir():
        return "/" in source or is_student_folder(path)
    return path.is_file() or parse_hub_id(source) is not None


def _name_from(source: str) -> str:
    hub_id = parse_hub_id(source)
    path = Path(source if hub_id is None else hub_id.repo)
    return re.sub(r"[^\w.-]", "-", path.stem if path.is_file() else path.name)


@dataclass(frozen=True)
class Recipe:
    """A task's YAML with the user's overrides."""

    task: Task
    path: str
    overrides: str = ""  # in s3prl's notation

    @property
    def config(self) -> dict[str, Any]:
        return apply_overrides(read_yaml(self.path), self.overrides)

    def check(self, folder: Path) -> None:
        """Raise ConfigError if a path in the recipe, or a file in its lists, is missing."""
        try:
            self._check(folder)
        except ConfigError as error:  # whose advice is an option of run_downstream.py
            text = re.sub(r'\B-o ("?)config', rf"--override \1{self.task.name}=config", str(error))
            raise ConfigError(text) from None

    def _check(self, folder: Path) -> None:
        check_override_keys(read_yaml(self.path), self.overrides, self.path)
        config = self.config
        if self.task.ctc_metric is not None:
            self._check_ctc_metric(config)
        for key, missing in missing_paths(config, self.task.paths, folder):
            raise ConfigError(
                f"{self.path}: {key}: no such path {missing}; edit it, prepare the data "
                f"(s3prl-ekd prepare {self.task.name} -h), or leave {self.task.name} out of --tasks"
            )
        try:
            folds = self.folds()
        except ConfigError:  # check_corpus may name the right folder
            check_corpus(self.task.downstream, config, self.path, folder=folder)
            raise
        for fold in folds:
            if fold is not None:
                config = apply_overrides(config, _fold_override(fold))
            check_corpus(self.task.downstream, config, self.path, folder=folder)
            if self.task.split not in (split for _, split in run_splits(config)):
                check_corpus(
                    self.task.downstream, config, self.path, self.task.split, folder=folder
                )

    def _check_ctc_metric(self, config: Mapping[str, Any]) -> None:
        """Check that s3prl chooses the checkpoint by the metric that the record names."""
        for key, expected in (
            ("metric", self.task.ctc_metric),
            ("metric_higher_better", self.task.dev.higher_is_better),
            ("save_best_on", "dev"),
        ):
            value = value_at(config, f"{EXPERT}.{key}")
            first = value[0] if isinstance(value, list) and value else value
            if first != expected:
                begin = " begin with" if key == "metric" else " be"
                raise ConfigError(
                    f"{self.path}: {EXPERT}.{key} must{begin} {expected}, by which superb "
                    f"chooses checkpoints and learning rates; got {value!r:.60}"
                )

    def data_digests(self, folder: Path) -> list[str]:
        """SHA-256 of each table that ``s3prl-ekd prepare`` wrote into the data folders, if any."""
        paths = [folder / path for _, path in recipe_paths(self.config, self.task.corpus)]
        tables = {parent / PREPARED for path in paths for parent in (path, path.parent)}
        files = {table.resolve() for table in tables if table.is_file()}
        return sorted(map(file_sha256, files))

    def digest(self, folder: Path) -> str:
        """SHA-256 of all settings but the learning rate and the fold, and of the prepared corpus.

        Runs with equal digests can be compared.
        """
        config = self.config
        for section, key in ((EXPERT, "max_workers"), ("optimizer", "lr"), (_DATA, "test_fold")):
            values = value_at(config, section)
            if isinstance(values, dict):
                values.pop(key, None)
        arguments = argument_overrides(self.overrides)
        return _digest([self.task.downstream, config, arguments, self.data_digests(folder)])

    def folds(self) -> list[str | None]:
        """The test folds of the recipe's data; see :meth:`.Task.folds`."""
        return self.task.folds(self.config, self.path)


def _fold_override(fold: str) -> str:
    return f"config.{_DATA}.test_fold={fold!r}"


def steps_overrides(steps: int) -> str:
    """Overrides for ``steps`` training steps with four evaluations.

    ``total_steps`` is rounded down to a multiple of the evaluation period, so that the last step is
    evaluated.
    """
    period = max(1, steps // 4)
    total = period * max(1, steps // period)
    keys = {"total_steps": total, "log_step": period, "eval_step": period, "save_step": period}
    return ",,".join(f"config.runner.{key}={value}" for key, value in keys.items())


@dataclass(frozen=True)
class PlannedRun:
    """One downstream model to train once and test on clean speech and under noise.

    ``noises``: condition -> (folder or manifest, SNR in dB).
    """

    upstream: Upstream
    recipe: Recipe
    lr: float | None  # None: nothing is trained
    seed: int
    fold: str | None
    root: Path = Path("result/superb")
    noises: Mapping[str, tuple[str, float]] = field(default_factory=dict, hash=False)
    features: CacheOptions | None = None  # if set, hidden states are computed without padding

    @property
    def task(self) -> Task:
        return self.recipe.task

    @property
    def name(self) -> str:
        name = UNTRAINED if self.lr is None else f"lr{self.lr:g}"
        name = f"{name}-seed{self.seed}"
        return name if self.fold is None else f"{name}-{self.fold}"

    @property
    def folder(self) -> Path:
        return self.root / self.upstream.name / self.task.name / self.name

    def to_json(self) -> bytes:
        """The run as JSON, for the process that executes it."""
        upstream, recipe = vars(self.upstream), {**vars(self.recipe), "task": self.task.name}
        features = None if self.features is None else vars(self.features)
        parts = {"upstream": upstream, "recipe": recipe, "features": features}
        return json.dumps({**vars(self), **parts, "root": str(self.root)}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> PlannedRun:
        """Inverse of :meth:`to_json`. Raises SetupError for anything else."""
        try:
            values = json.loads(data)
            recipe, features = values["recipe"], values["features"]
            values["upstream"] = Upstream(**values["upstream"])
            values["recipe"] = Recipe(**{**recipe, "task": TASKS[recipe["task"]]})
            values["features"] = None if features is None else CacheOptions(**features)
            values["noises"] = {name: tuple(noise) for name, noise in values["noises"].items()}
            return cls(**{**values, "root": Path(values["root"])})
        except (ValueError, KeyError, TypeError):
            raise SetupError("expected a run of s3prl-ekd superb; type that command") from None

    @property
    def overrides(self) -> str:
        parts = [self.recipe.overrides] if self.recipe.overrides else []
        if self.lr is not None:
            parts.append(f"config.optimizer.lr={self.lr!r}")
        if self.fold is not None:
            parts.append(_fold_override(self.fold))
        return ",,".join(parts)

    @property
    def config(self) -> dict[str, Any]:
        """The recipe with the overrides of this run."""
        return replace(self.recipe, overrides=self.overrides).config

    @property
    def digest(self) -> str:
        """SHA-256 of everything that determines the result."""
        config = self.config
        if isinstance(config.get(EXPERT), dict):
            config[EXPERT].pop("max_workers", None)  # of QbE: how many processes
        facts = [self.upstream.identity, config, self.task.downstream, self.seed]
        facts += self.recipe.data_digests(Path.cwd())
        if arguments := argument_overrides(self.recipe.overrides):
            facts.append(arguments)
        if self.features is not None:  # padding changes the hidden states
            facts.append("features of each utterance alone")
        return _digest(facts)

    def new_record(self) -> RunRecord:
        """The record of the run before it starts."""
        folds = [fold for fold in self.recipe.folds() if fold is not None]
        values = {
            "format": 1,
            "upstream": self.upstream.name,
            "hub": self.upstream.hub,
            "checkpoint": self.upstream.checkpoint,
            "task": self.task.name,
            "lr": self.lr,
            "seed": self.seed,
            "fold": self.fold,
            "steps": self.recipe.config["runner"]["total_steps"] if self.task.trained else 0,
            "recipe": self.recipe.path,
            "split": self.task.split,
            "digest": self.digest,
            "features_alone": self.features is not None,
            "model": self.upstream.digest,
            "recipe_digest": self.recipe.digest(Path.cwd()),
            "folds": folds or None,
        }
        return from_plain_data(RunRecord, values, f"the run in {self.folder}")

    def training(self) -> DownstreamRequest:
        """The request that trains the run, resuming it if it was interrupted."""
        return DownstreamRequest(
            mode="train",
            auto_resume=True,
            upstream=self.upstream.hub,
            upstream_ckpt=self.upstream.checkpoint,
            upstream_feature_selection=self.upstream.selection,
            downstream=self.task.downstream,
            config=self.recipe.path,
            expdir=str(self.folder),
            seed=self.seed,
            override=self.overrides or None,
            cache=self.features,
        )

    def test(self, chosen: DevMetric, condition: str) -> DownstreamRequest:
        """The request that tests a checkpoint or layer; under noise it writes into
        ``noisy/CONDITION``."""
        if chosen.layer is not None:
            request = self.layer_test(chosen.layer, self.task.split, self.folder)
        else:
            request = self.checkpoint_test(str(chosen.checkpoint))
        noise = None if condition == CLEAN else NoisyTest(*self.noises[condition])
        return replace(request, noise=noise)

    def checkpoint_test(self, checkpoint: str, expdir: Path | None = None) -> DownstreamRequest:
        """The request that tests a checkpoint, by default into the run's folder."""
        return DownstreamRequest(
            mode="evaluate",
            evaluate_split=self.task.split,
            past_exp=str(self.folder / checkpoint),
            override=None if expdir is None else f"args.expdir={override_value(str(expdir))}",
            cache=self.features,
        )

    def layer_test(self, layer: int, split: str, expdir: Path) -> DownstreamRequest:
        """The request that evaluates a layer of the upstream, for a task without training."""
        return replace(
            self.training(),
            mode="evaluate",
            auto_resume=False,
            evaluate_split=split,
            expdir=str(expdir),
            upstream_layer_selection=layer,
        )

    @property
    def conditions(self) -> dict[str, str]:
        """Condition -> folder of its prediction files, relative to the run's folder."""
        return {CLEAN: ".", **{name: f"noisy/{name}" for name in self.noises}}


def noise_conditions(folders: Sequence[str], snrs: Sequence[float]) -> dict:
    """Build the noise conditions: ``{babble_snr5: (folder, 5.0), ...}``, and check the noises."""
    if bool(folders) != bool(snrs):
        raise SetupError("--noise and --snr must be given together: --noise FOLDER --snr 10 5 0")
    conditions: dict[str, tuple[str, float]] = {}
    for folder in folders:
        from ..downstream.noise import find_noises  # which imports torch

        find_noises(folder)
        for snr in snrs:
            if not math.isfinite(snr):
                raise SetupError(f"--snr must be a finite number of dB, such as 5, got {snr}")
            name = condition_name(folder, snr)
            if name in conditions:
                raise SetupError(
                    f"--noise {conditions[name][0]} and {folder} at {snr:g} dB have the same "
                    f"condition name {name}; rename a folder, or give each folder and SNR once"
                )
            conditions[name] = (folder, float(snr))
    return conditions


@cache
def noise_digest(folder: str) -> str:
    """SHA-256 of the names and sizes of the noise files in a folder or manifest."""
    from ..downstream.noise import find_noises

    noises = find_noises(folder)
    pairs = zip(noises.names, noises.parts, strict=True)
    return _digest([[name, os.path.getsize(part.path)] for name, part in pairs])


def plan_runs(args: Namespace) -> list[PlannedRun]:
    """List the runs for the options of ``s3prl-ekd superb``, and check all before the first starts.

    Raises:
        EkdError: an option, a recipe, an upstream or a corpus is wrong.
    """
    tasks = choose_tasks(args.tasks or DEFAULT_TASKS)
    seeds = args.seeds or [SEED]
    if min(args.jobs, args.gpus) != 1:
        raise SetupError(
            "--jobs and --gpus must be 1 or more, and not both above 1, got "
            f"{args.jobs} and {args.gpus}"
        )
    if len(set(seeds)) < len(seeds):
        raise SetupError(f"--seeds must differ, got {' '.join(map(str, seeds))}")
    upstreams = [parse_upstream(text, args.selection) for text in args.upstreams]
    names = [upstream.name for upstream in upstreams]
    for name in names:
        if names.count(name) > 1:
            raise SetupError(f"two upstreams are named {name}; name them NAME=CHECKPOINT")
    paths = _by_task("--recipe", args.recipe, tasks)
    rates = _by_task("--lr", args.lr, tasks)
    steps = _by_task("--steps", args.steps, tasks)
    overrides = _by_task("--override", args.override, tasks)
    for upstream in upstreams:
        for path in (upstream.checkpoint, upstream.hub):
            if path and "'" in path:
                raise SetupError(f"upstream {path}: quotes (') are not allowed in its name or path")
    noises = noise_conditions(args.noise, args.snr)
    features = {name: _features(args, name) for name in names}
    runs = []
    for task in tasks:
        path = paths.get(task.name, getattr(task, args.recipes))
        if not Path(path).is_file():
            raise SetupError(f"no such recipe {path} in this folder; type: s3prl-ekd init .")
        parts = []
        if task.name in steps and task.trained:
            parts.append(steps_overrides(_number("--steps", steps[task.name], int)))
        if task.name in overrides:
            parts.append(overrides[task.name])
        recipe = Recipe(task, path, ",,".join(parts))
        recipe.check(Path.cwd())
        lrs = _learning_rates(recipe, rates.get(task.name))
        own_seeds = seeds if task.trained else [SEED]  # which has no effect
        for upstream, lr, seed, fold in product(upstreams, lrs, own_seeds, recipe.folds()):
            options = (args.output, noises, features[upstream.name])
            runs.append(PlannedRun(upstream, recipe, lr, seed, fold, *options))
    # all runs of the first upstream come first, so its results on all tasks are known early
    return sorted(runs, key=lambda run: names.index(run.upstream.name))


def _learning_rates(recipe: Recipe, text: str | None) -> Sequence[float | None]:
    """The learning rates to try; ``text`` is the value of ``--lr``, None if it is not given."""
    task = recipe.task
    if not task.trained:
        return [None]
    if text in (None, SEARCH):
        key = "optimizer.lr"
        own: float = _number(f"{recipe.path}: {key}", str(value_at(recipe.config, key)), float)
        published = task.published_rates if recipe.path == task.full else ()
        grid = (float(f"{rate:g}") for rate in (own / 10, 10 * own))  # as they would be typed
        return sorted({own, *grid, *published}) if text else [own]
    texts = str(text).split(",")
    if SEARCH in texts:
        raise SetupError(f"--lr {SEARCH} cannot be combined with other rates, got {text}")
    rates = [_number("--lr", rate, float) for rate in texts]
    if len({f"{rate:g}" for rate in rates}) < len(rates):  # as in the names of the runs' folders
        raise SetupError(f"--lr must have rates that differ in their first six digits, got {text}")
    return rates


def _features(args: Namespace, upstream: str) -> CacheOptions | None:
    """The feature cache of an upstream, or None: by default only the tiny recipes have one."""
    folder = args.cache_features
    if folder is None and args.recipes == "tiny" and args.gpus == 1:
        folder = ""
    if folder is None or folder is False:
        if args.keep_features:
            raise SetupError(f"--keep-features needs {CACHE}")
        return None
    if args.gpus > 1:
        raise SetupError(f"{CACHE} needs --gpus 1: it works with one training process only")
    folder = folder or str(args.output / FEATURES / upstream)
    return parse_cache_options(folder, args.cache_features_gb)


def _by_task(option: str, texts: Sequence[str], tasks: Sequence[Task]) -> dict[str, str]:
    """``["pr=1e-3", ...]`` -> ``{"pr": "1e-3"}``; a value without a task's name applies to all.

    A task's own values replace general ones; its overrides follow them. Several values for a task
    are joined if they are overrides or learning rates, and an error otherwise.
    """
    general: list[str] = []
    own: dict[str, list[str]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if equals and name in TASKS:
            if TASKS[name] not in tasks:
                raise SetupError(f"{option} {text}: {name} is not in --tasks; add it there")
            if option in ("--lr", "--steps") and not TASKS[name].trained:
                raise SetupError(f"{option} {text}: {name} trains nothing; leave it out")
            own.setdefault(name, []).append(value)
        elif (
            not equals
            or (option == "--override" and "." in name)
            or (option == "--recipe" and Path(text).is_file())  # a path may contain =
        ):
            general.append(text)
        else:
            raise SetupError(f"{option} {text}: no such task; expected: {', '.join(TASKS)}")
    for values in (general, *own.values()):
        if len(values) > 1 and option not in _JOINED:
            raise SetupError(f"{option}: {values[0]} and {values[1]} for one task; give it once")
    result = {}
    for task in tasks:
        values = own.get(task.name, [])
        values = [*general, *values] if option == "--override" else values or general
        if values:
            result[task.name] = _JOINED.get(option, "").join(values)
    return result


def _number(option: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        name = "an integer" if kind is int else "a number"
        raise SetupError(f"{option} must be {name} above 0, got {text}")
    return number
