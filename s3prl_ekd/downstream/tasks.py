"""The four SUPERB tasks in s3prl: recipes and their paths, splits, metrics, files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SetupError


@dataclass(frozen=True)
class Task:
    """A SUPERB task.

    Attributes:
        name: short name, used on the command line.
        downstream: the name after ``-d``.
        full, tiny: paths of the recipes in the working folder.
        split: the test split, as given to ``-t``.
        best: the checkpoint with the best dev score, written by s3prl.
        metric: ``per``, ``wer`` or ``acc``; in per cent everywhere in this package.
        scale: factor that converts the score in s3prl's best checkpoint to per cent.
        hyp, ref: names of the prediction files; ER's contain ``{fold}``.
        recipe_files: dotted YAML keys of the files that come with a recipe.
        folders, lists: dotted YAML keys of the corpus paths, which the user sets: of folders, and
            of files that list or describe the corpus.
        modules: modules besides the expert that the recipe imports while it runs.
    """

    name: str
    downstream: str
    full: str
    tiny: str
    split: str
    best: str
    metric: str
    scale: float
    hyp: str
    ref: str
    recipe_files: tuple[str, ...]
    folders: tuple[str, ...]
    lists: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "acc"

    @property
    def title(self) -> str:
        """Title as in SUPERB's tables: ``PR PER ↓``."""
        return f"{self.name.upper()} {self.metric.upper()} {'↑' if self.higher_is_better else '↓'}"

    @property
    def corpus(self) -> tuple[str, ...]:
        """YAML keys of the paths that the user sets."""
        return self.folders + self.lists

    @property
    def paths(self) -> tuple[str, ...]:
        """YAML keys of all paths in the recipe."""
        return self.recipe_files + self.corpus

    @property
    def worst(self) -> float:
        return 0.0 if self.higher_is_better else 100.0

    def files(self, fold: str | None) -> tuple[str, str]:
        """File names of hypotheses and references in a run's folder."""
        return self.hyp.format(fold=fold), self.ref.format(fold=fold)


EXPERT = "downstream_expert"
TASKS = {
    "pr": Task(
        "pr", "ctc", "downstream/ctc/libriphone.yaml", "downstream/ctc/tiny.yaml",
        "test", "dev-best.ckpt", "per", 100.0, "test-hyp.ark", "test-ref.ark",
        (f"{EXPERT}.text.vocab_file",),
        (f"{EXPERT}.corpus.path",),
        (f"{EXPERT}.corpus.lexicon",),
        # imported with the first data loader; see requirements.provide_ctc_corpus
        ("s3prl.downstream.ctc.corpus.libriphone",),
    ),
    "sid": Task(
        "sid", "voxceleb1", "downstream/voxceleb1/config.yaml", "downstream/voxceleb1/tiny.yaml",
        "test", "dev-best.ckpt", "acc", 100.0, "test_predict.txt", "test_truth.txt",
        (),
        (f"{EXPERT}.datarc.file_path",),
        (f"{EXPERT}.datarc.meta_data",),
    ),
    "er": Task(
        "er", "emotion", "downstream/emotion/config.yaml", "downstream/emotion/tiny.yaml",
        "test", "dev-best.ckpt", "acc", 100.0, "test_{fold}_predict.txt", "test_{fold}_truth.txt",
        (),
        (f"{EXPERT}.datarc.root", f"{EXPERT}.datarc.meta_data"),
    ),
    "asr": Task(
        "asr", "asr", "downstream/asr/config.yaml", "downstream/asr/tiny.yaml",
        "test-clean", "dev-clean-best.ckpt", "wer", 1.0,
        "test-clean-noLM-hyp.ark", "test-clean-noLM-ref.ark",
        (f"{EXPERT}.datarc.dict_path",),
        (f"{EXPERT}.datarc.libri_root", f"{EXPERT}.datarc.bucket_file"),
    ),
}  # fmt: skip


def task_of(downstream: str | None) -> Task | None:
    """The task for a ``-d`` name; None for s3prl's other recipes."""
    return next((task for task in TASKS.values() if task.downstream == downstream), None)


def choose_tasks(names: Sequence[str]) -> list[Task]:
    """The named tasks, in the order of SUPERB's tables."""
    for name in names:
        if name not in TASKS:
            raise SetupError(f"unknown task {name!r}; expected one of: {', '.join(TASKS)}")
    return [task for task in TASKS.values() if task.name in names]


def setting(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None if there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def recipe_paths(config: Mapping[str, Any], keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield ``(key, path)`` for each path set under the dotted ``keys``."""
    for key in keys:
        value = setting(config, key)
        for path in value if isinstance(value, list) else [] if value is None else [value]:
            yield key, str(path)


def missing_paths(
    config: Mapping[str, Any], keys: Sequence[str], folder: Path
) -> Iterator[tuple[str, str]]:
    """Yield ``(key, path)`` for each path in ``config`` that does not exist below ``folder``."""
    return ((key, path) for key, path in recipe_paths(config, keys) if not (folder / path).exists())
