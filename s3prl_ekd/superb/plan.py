"""What `s3prl-ekd superb` is to run: upstreams × tasks × learning rates × seeds × folds."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..downstream.arguments import CacheOptions
from ..downstream.corpus_check import check_corpus
from ..downstream.noise import condition_name, find_noises
from ..downstream.recipes import RECIPES, missing_paths, recipe_paths
from ..downstream.tasks import Task
from ..errors import ConfigError, SetupError
from ..files import trust
from ..files.atomic import file_sha256
from ..files.config import apply_overrides, read_yaml
from ..prepare.er import natural
from ..prepare.new_folder import PREPARED
from ..teachers import zoo

CLEAN = "clean"
_NAME = r"[\w.-]+"  # of an upstream, and of its folder


@dataclass(frozen=True)
class Upstream:
    """What is evaluated: a name of s3prl's hub, with a checkpoint where it wants one."""

    name: str
    hub: str
    checkpoint: str | None = None
    selection: str = "hidden_states"

    @property
    def words(self) -> list[str]:
        words = ["-u", self.hub]
        if self.checkpoint is not None:
            words += ["-k", self.checkpoint]
        return words if self.selection == "hidden_states" else [*words, "-s", self.selection]

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

    @property
    def _paths(self):
        """Which of its keys are paths."""
        return next(known for known in RECIPES if known.downstream == self.task.downstream)

    def check(self, folder: Path) -> None:
        """Raise ConfigError where a file or a folder that the recipe names is not there, or a
        folder has not the files that the recipe's lists name."""
        config = self.config
        for key, missing in missing_paths(config, self._paths.files + self._paths.data, folder):
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
        for path in recipe_paths(self.config, self._paths.data):
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

    def train_words(self) -> list[str]:
        """The training command, as typed; ``-a`` takes up a cut run."""
        words = ["run_downstream.py", "-m", "train", "-a", *self.upstream.words]
        words += ["-d", self.task.downstream, "-c", self.recipe.path, "-p", str(self.folder)]
        words += ["--seed", str(self.seed), "-o", self.overrides]
        return [*words, *self._added]

    def test_words(self, checkpoint: str, condition: str) -> list[str]:
        """The command of one evaluation; noisy ones write below ``noisy/``."""
        words = ["run_downstream.py", "-m", "evaluate", "-t", self.task.split]
        words += ["-e", str(self.folder / checkpoint)]
        if condition != CLEAN:
            folder, snr = self.noises[condition]
            words += ["--noise", folder, "--snr", f"{snr:g}"]
        return [*words, *self._added]

    @property
    def _added(self) -> list[str]:
        """What both commands have beside s3prl's options."""
        return trust.words() + ([] if self.features is None else self.features.words)

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
