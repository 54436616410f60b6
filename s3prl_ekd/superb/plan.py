"""What `s3prl-ekd superb` is to run: upstreams × tasks × learning rates × seeds × folds."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from ..downstream.corpus_check import check_corpus
from ..downstream.noise import find_noises
from ..downstream.tasks import TASKS, Task, choose_tasks, missing_paths, recipe_paths
from ..errors import ConfigError, SetupError
from ..files.atomic import file_sha256
from ..files.config import apply_overrides, read_yaml
from ..prepare.er import natural
from ..prepare.new_folder import PREPARED
from ..request import (
    CACHE,
    CacheOptions,
    DownstreamRequest,
    NoisyTest,
    condition_name,
    read_cache,
)
from ..teachers import zoo

CLEAN = "clean"
FEATURES = ".features"  # below the output
_NAME = r"[\w.-]+"  # of an upstream, and of its folder


@dataclass(frozen=True)
class Upstream:
    """What is evaluated: a name of s3prl's hub, with a checkpoint where it wants one."""

    name: str
    hub: str
    checkpoint: str | None = None
    selection: str = "hidden_states"

    @property
    def identity(self) -> list[str]:
        """What decides its outputs: not the path of the checkpoint but its contents."""
        path = self.checkpoint
        if path is None and self.hub in zoo.NAMES:  # a file of ours, which another version changes
            path = str(zoo.weights(self.hub))
        known = _sha256(path) if path is not None and Path(path).is_file() else str(path)
        return [self.hub, known, self.selection]

    @property
    def digest(self) -> str:
        """Of :attr:`identity`."""
        return _digest(self.identity)


_sha256 = cache(file_sha256)  # asked for every run of an upstream


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def parse_upstream(text: str, selection: str = "hidden_states") -> Upstream:
    """``student.pt``, ``fbank``, ``NAME=student.pt``, ``NAME=HUB`` or ``NAME=HUB:CHECKPOINT``.

    Paths may have ``=`` signs: a file that is there is meant whole, and what stands before the
    first sign is a name only if it can be one. A name taken from a file has ``-`` in the place of
    what a name cannot have.

    Raises:
        SetupError: a file that is not there, or a name that cannot be a folder's.
    """
    name, equals, what = text.partition("=")
    if not equals or Path(text).is_file() or not re.fullmatch(_NAME, name):
        name, what = "", text
    hub, colon, checkpoint = what.partition(":")
    if Path(what).is_file():
        chosen = Upstream(name or _named_after(what), "ekd_student", what, selection)
    elif colon and not what.startswith(("http://", "https://")):
        if not Path(checkpoint).exists():
            raise SetupError(f"{text}: there is no such file: {checkpoint}")
        chosen = Upstream(name or f"{hub}-{_named_after(checkpoint)}", hub, checkpoint)
    elif re.fullmatch(r"\w+", what):
        chosen = Upstream(name or what, what)
    else:
        raise SetupError(
            f"{text}: there is no such file; an upstream is a student file, a name of s3prl's hub, "
            "NAME=student.pt or NAME=HUB:CHECKPOINT"
        )
    if not re.fullmatch(_NAME, chosen.name) or chosen.name.startswith("."):
        raise SetupError(f"{text}: the name {chosen.name!r} may have letters, digits, _ - and .")
    return chosen


def _named_after(path: str) -> str:
    return re.sub(r"[^\w.-]", "-", Path(path).stem)


@dataclass(frozen=True)
class Recipe:
    """A task's YAML with what the user changed in it."""

    task: Task
    path: str
    overrides: str = ""  # in s3prl's notation

    @property
    def config(self) -> dict[str, Any]:
        config = read_yaml(self.path)
        return apply_overrides(config, self.overrides) if self.overrides else config

    def check(self, folder: Path) -> None:
        """Raise ConfigError where a file or a folder that the recipe names is not there, or a
        folder has not the files that the recipe's lists name."""
        config = self.config
        for key, missing in missing_paths(config, self.task.paths, folder):
            raise ConfigError(
                f"{self.path}: {key} is {missing}, which is not there; edit it, prepare the data "
                f"(s3prl-ekd prepare {self.task.name} -h), or leave {self.task.name} out of --tasks"
            )
        try:
            folds = self.folds()
        except ConfigError:  # the check may know where they are
            check_corpus(self.task.downstream, config, self.path, folder=folder)
            raise
        for fold in folds:
            if fold is not None:
                config = apply_overrides(
                    config, f"config.downstream_expert.datarc.test_fold={fold!r}"
                )
            check_corpus(self.task.downstream, config, self.path, folder=folder)

    def data_digests(self, folder: Path) -> list[str]:
        """Of the tables that ``s3prl-ekd prepare`` left in the data folders; of data in its own
        layout nothing is known."""
        found = {}
        for _, path in recipe_paths(self.config, self.task.corpus):
            for place in (folder / path, (folder / path).parent):
                table = place / PREPARED
                if table.is_file():
                    found[table.resolve()] = file_sha256(table)
        return sorted(found.values())

    def folds(self) -> list[str | None]:
        """ER: ``fold1`` … for each session that has metadata; one run without a fold else."""
        if self.task.name != "er":
            return [None]
        meta = Path(self.config["downstream_expert"]["datarc"]["meta_data"])
        found = sorted((path.name for path in meta.glob("Session*")), key=natural)
        if not found:
            raise ConfigError(f"{self.path}: {meta} has no Session1, Session2, ...")
        return [name.replace("Session", "fold") for name in found]

    def learning_rate(self) -> float:
        return float(self.config["optimizer"]["lr"])


def steps_overrides(steps: int) -> str:
    """Overrides for a run of ``steps`` steps with four evaluations, none of them lost."""
    every = max(1, steps // 4)
    total = every * max(1, steps // every)
    keys = {"total_steps": total, "log_step": every, "eval_step": every, "save_step": every}
    return ",,".join(f"config.runner.{key}={value}" for key, value in keys.items())


@dataclass(frozen=True)
class Run:
    """One downstream model: trained once, tested under one or more conditions."""

    upstream: Upstream
    recipe: Recipe
    lr: float
    seed: int
    fold: str | None
    root: Path = Path("result/superb")
    noises: Mapping[str, tuple[str, float]] = field(default_factory=dict, hash=False)
    features: CacheOptions | None = None  # hidden states of each utterance alone, kept

    @property
    def task(self) -> Task:
        return self.recipe.task

    @property
    def name(self) -> str:
        name = f"lr{self.lr:g}-seed{self.seed}"
        return name if self.fold is None else f"{name}-{self.fold}"

    @property
    def folder(self) -> Path:
        return self.root / self.upstream.name / self.task.name / self.name

    @property
    def overrides(self) -> str:
        parts = [self.recipe.overrides] if self.recipe.overrides else []
        parts.append(f"config.optimizer.lr={self.lr!r}")
        if self.fold is not None:
            parts.append(f"config.downstream_expert.datarc.test_fold='{self.fold}'")
        return ",,".join(parts)

    @property
    def digest(self) -> str:
        """Of what decides the result."""
        config = apply_overrides(read_yaml(self.recipe.path), self.overrides)
        facts = [self.upstream.identity, config, self.task.downstream, self.seed]
        facts += self.recipe.data_digests(Path.cwd())
        if self.features is not None:  # without padding, hidden states differ a little
            facts.append("features of each utterance alone")
        return _digest(facts)

    def training(self) -> DownstreamRequest:
        """The training; a run that was cut is resumed."""
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
            override=self.overrides,
            cache=self.features,
        )

    def test(self, checkpoint: str, condition: str) -> DownstreamRequest:
        """One evaluation; noisy ones write below ``noisy/``."""
        return DownstreamRequest(
            mode="evaluate",
            evaluate_split=self.task.split,
            past_exp=str(self.folder / checkpoint),
            noise=None if condition == CLEAN else NoisyTest(*self.noises[condition]),
            cache=self.features,
        )

    @property
    def conditions(self) -> dict[str, str]:
        """Condition -> folder of its prediction files, below the run's."""
        return {CLEAN: ".", **{name: f"noisy/{name}" for name in self.noises}}


def noise_conditions(folders: Sequence[str], snrs: Sequence[float]) -> dict:
    """``{babble_snr5: (folder, 5.0), …}``.

    Raises:
        SetupError: only one of the two was given, two conditions have one name, or a ratio is no
            number of dB.
        DataError: no noises are there; found out now, and not when the training is done.
    """
    if bool(folders) != bool(snrs):
        raise SetupError("--noise and --snr go together: --noise FOLDER --snr 10 5 0")
    found: dict[str, tuple[str, float]] = {}
    for folder in folders:
        find_noises(folder)
        for snr in snrs:
            if not math.isfinite(snr):
                raise SetupError(f"--snr {snr}: a number of dB is needed, such as 5")
            name = condition_name(folder, snr)
            if name in found:
                raise SetupError(
                    f"--noise {found[name][0]} and {folder} at {snr:g} dB have one name, {name}; "
                    "rename a folder, or name each once"
                )
            found[name] = (folder, float(snr))
    return found


@cache
def noise_digest(folder: str) -> str:
    """Of the names and sizes of the noises in a folder or manifest: a name says too little."""
    noises = find_noises(folder)
    return _digest([[name, os.path.getsize(noises.root / name)] for name in noises.names])


def plan(args: Namespace) -> list[Run]:
    """The runs that the options ask for, all checked before the first one begins.

    Args:
        args: the options of ``s3prl-ekd superb``; see :mod:`..commands.superb`.

    Raises:
        EkdError: one sentence for what the user can mend.
    """
    tasks = choose_tasks(args.tasks)
    if args.jobs < 1 or args.gpus < 1:
        raise SetupError("--jobs and --gpus must be 1 or more")
    if len(set(args.seeds)) < len(args.seeds):
        raise SetupError("--seeds names a seed twice")
    upstreams = [parse_upstream(text, args.selection) for text in args.upstreams]
    names = [upstream.name for upstream in upstreams]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SetupError(f"two upstreams are called {twice.pop()}; name them: NAME=CHECKPOINT")
    recipes_of = _by_task("--recipe", args.recipe, tasks)
    rates = _by_task("--lr", args.lr, tasks)
    steps = _by_task("--steps", args.steps, tasks)
    more = _by_task("--override", args.override, tasks)
    for upstream in upstreams:
        for path in (upstream.checkpoint, upstream.hub):
            if path and "'" in path:
                raise SetupError(f"{path}: quotes cannot stand in an upstream's name")
    noises = noise_conditions(args.noise, args.snr)
    features = {name: _features(args, name) for name in names}
    runs = []
    for task in tasks:
        path = recipes_of.get(task.name, getattr(task, args.recipes))
        if not Path(path).is_file():
            raise SetupError(f"there is no recipe {path} in this folder; type: s3prl-ekd init .")
        parts = []
        if task.name in steps:
            parts.append(steps_overrides(_number("--steps", steps[task.name], int)))
        if task.name in more:
            parts.append(more[task.name])
        recipe = Recipe(task, path, ",,".join(parts))
        recipe.check(Path.cwd())
        texts = rates[task.name].split(",") if rates.get(task.name) else []
        lrs = [_number("--lr", text, float) for text in texts] or [recipe.learning_rate()]
        for upstream, lr, seed, fold in product(upstreams, lrs, args.seeds, recipe.folds()):
            facts = (args.output, noises, features[upstream.name])
            runs.append(Run(upstream, recipe, lr, seed, fold, *facts))
    # an upstream's four tasks together, so that the first numbers to compare come early
    return sorted(runs, key=lambda run: names.index(run.upstream.name))


def _features(args: Namespace, upstream: str) -> CacheOptions | None:
    """Where an upstream's hidden states are kept: a folder of its own, unless the user named one,
    in which the digests of several keep them apart."""
    if args.cache_features is None:
        if args.keep_features:
            raise SetupError(f"--keep-features goes with {CACHE}")
        return None
    if args.gpus > 1:
        raise SetupError(f"{CACHE} is for --gpus 1: several processes train without it")
    folder = args.cache_features or str(args.output / FEATURES / upstream)
    return read_cache(folder, args.cache_features_gb)


def _by_task(option: str, given: Sequence[str], tasks: Sequence[Task]) -> dict[str, str]:
    """``["pr=1e-3", …]`` -> ``{"pr": "1e-3"}``; without a task's name for all tasks."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if equals and name in TASKS:
            found[name] = value
        elif option == "--recipe" and Path(text).is_file():  # its path may have = signs
            found.update({task.name: text for task in tasks})
        elif not equals or (option == "--override" and "." in name):
            found.update({task.name: text for task in tasks})
        else:
            raise SetupError(f"{option} {text}: unknown task {name!r}; known: {', '.join(TASKS)}")
    return found


def _number(option: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise SetupError(f"{option} {text}: a number above 0 is needed")
    return number
