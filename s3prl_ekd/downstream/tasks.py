"""The four SUPERB tasks as s3prl runs them: recipes and their paths, splits, metrics, files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SetupError


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: what the user types.
        downstream: the name after ``-d``.
        full, tiny: recipes below the working folder.
        split: the split that is tested, as ``-t`` wants it.
        best: the checkpoint that s3prl keeps by dev.
        metric: ``per``, ``wer`` or ``acc``; in per cent everywhere in this package.
        scale: what makes s3prl's number, as a best checkpoint holds it, per cent.
        hyp, ref: the prediction files; ``{fold}`` stands in ER's.
        recipe_files: YAML keys, dotted, of the files that come with a recipe.
        corpus: YAML keys, dotted, of the corpus: the user's to set.
        modules: what it imports only once it runs, beside the expert.
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
    corpus: tuple[str, ...]
    modules: tuple[str, ...] = ()

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "acc"

    @property
    def title(self) -> str:
        """As in SUPERB's tables: ``PR PER ↓``."""
        return f"{self.name.upper()} {self.metric.upper()} {'↑' if self.higher_is_better else '↓'}"

    @property
    def paths(self) -> tuple[str, ...]:
        """The keys of all paths in the recipe."""
        return self.recipe_files + self.corpus

    @property
    def worst(self) -> float:
        return 0.0 if self.higher_is_better else 100.0

    def files(self, fold: str | None) -> tuple[str, str]:
        """Names of the hypotheses and the references in a run's folder."""
        return self.hyp.format(fold=fold), self.ref.format(fold=fold)


_EXPERT = "downstream_expert"
TASKS = {
    "pr": Task(
        "pr", "ctc", "downstream/ctc/libriphone.yaml", "downstream/ctc/tiny.yaml",
        "test", "dev-best.ckpt", "per", 100.0, "test-hyp.ark", "test-ref.ark",
        (f"{_EXPERT}.text.vocab_file",),
        (f"{_EXPERT}.corpus.path", f"{_EXPERT}.corpus.lexicon"),
        # s3prl imports it with the first data loader; provide_ctc_corpus sees to it
        ("s3prl.downstream.ctc.corpus.libriphone",),
    ),
    "sid": Task(
        "sid", "voxceleb1", "downstream/voxceleb1/config.yaml", "downstream/voxceleb1/tiny.yaml",
        "test", "dev-best.ckpt", "acc", 100.0, "test_predict.txt", "test_truth.txt",
        (),
        (f"{_EXPERT}.datarc.file_path", f"{_EXPERT}.datarc.meta_data"),
    ),
    "er": Task(
        "er", "emotion", "downstream/emotion/config.yaml", "downstream/emotion/tiny.yaml",
        "test", "dev-best.ckpt", "acc", 100.0, "test_{fold}_predict.txt", "test_{fold}_truth.txt",
        (),
        (f"{_EXPERT}.datarc.root", f"{_EXPERT}.datarc.meta_data"),
    ),
    "asr": Task(
        "asr", "asr", "downstream/asr/config.yaml", "downstream/asr/tiny.yaml",
        "test-clean", "dev-clean-best.ckpt", "wer", 1.0,
        "test-clean-noLM-hyp.ark", "test-clean-noLM-ref.ark",
        (f"{_EXPERT}.datarc.dict_path",),
        (f"{_EXPERT}.datarc.libri_root", f"{_EXPERT}.datarc.bucket_file"),
    ),
}  # fmt: skip


def task_of(downstream: str | None) -> Task | None:
    """The task of a name after ``-d``; None for s3prl's other recipes."""
    return next((task for task in TASKS.values() if task.downstream == downstream), None)


def choose_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks named, in the order of SUPERB's tables.

    Raises:
        SetupError: one is unknown.
    """
    for name in names:
        if name not in TASKS:
            raise SetupError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return [task for task in TASKS.values() if task.name in names]


def recipe_paths(config: Mapping[str, Any], keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """``(key, path)`` of each path under dotted ``keys``; none where a key is not set."""
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        for path in value if isinstance(value, list) else [] if value is None else [value]:
            yield key, str(path)


def missing_paths(
    config: Mapping[str, Any], keys: Sequence[str], folder: Path
) -> Iterator[tuple[str, str]]:
    """``(key, path)`` of each path that ``config`` has under ``keys`` and ``folder`` has not."""
    for key, path in recipe_paths(config, keys):
        if not (folder / path).exists():
            yield key, path
