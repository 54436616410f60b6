"""A SUPERB task in s3prl: recipes and their paths, splits, metrics, prediction files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .lookup import EXPERT, FileLookup, RecipeFiles, setting

Unit = Literal["label", "word"]
HubType = Literal["automatic-speech-recognition", "audio-classification"]


@dataclass(frozen=True)
class Metric:
    """A metric of a task, in per cent everywhere in this package.

    Attributes:
        name: ``per``, ``wer`` or ``acc``.
        unit: what is compared: a label, or the edits of words (phones) or characters.
        anchors: of FBANK and of the best system on SUPERB's public set, of which its score is made.
    """

    name: str
    unit: Unit
    anchors: tuple[float, float]

    @property
    def higher_is_better(self) -> bool:
        return self.name == "acc"


@dataclass(frozen=True)
class Task:
    """A SUPERB task.

    Attributes:
        name: short name, used on the command line.
        full_name: in words, as in "phone recognition".
        hub_type: task of the Hugging Face Hub, for model cards.
        downstream: the name after ``-d``.
        full, tiny: paths of the recipes in the working folder.
        split: the test split, as given to ``-t``.
        best: the checkpoint with the best dev score, written by s3prl.
        main: its metric.
        scale: factor that converts the score in s3prl's best checkpoint to per cent.
        hyp, ref: names of the prediction files; ER's contain ``{fold}``.
        separator: between an utterance and its label in the prediction files.
        archive: file in the archive for SUPERB's board, below predict/; with ``{fold}`` likewise.
        recipe_files: dotted YAML keys of the files that come with a recipe.
        folders, lists: dotted YAML keys of the corpus paths, which the user sets: of folders, and
            of files that list or describe the corpus.
        find_files: the files that a recipe lists, for :func:`.corpus_check.check_corpus`.
        modules: modules besides the expert that the recipe imports while it runs.
        find_folds: config -> test folds, each a run of its own; without it, one run.
        board_folds: the folds that SUPERB's board wants.
        corpus_name: ``downstream_expert.corpus.name`` of the recipe, if tasks share a downstream.
        demo_steps: training steps in the demo, times those of its option.
        batch_seconds, parameters: of a batch of the full recipe on one GPU, and of the downstream
            model, for the projection of `s3prl-ekd recipe`; ours.
    """

    name: str
    full_name: str
    hub_type: HubType
    downstream: str
    full: str
    tiny: str
    split: str
    best: str
    main: Metric
    scale: float
    hyp: str
    ref: str
    archive: str
    recipe_files: tuple[str, ...]
    folders: tuple[str, ...]
    lists: tuple[str, ...]
    find_files: Callable[[RecipeFiles], Iterator[FileLookup]]
    batch_seconds: float
    parameters: float
    modules: tuple[str, ...] = ()
    find_folds: Callable[[Mapping[str, Any], str], list[str]] | None = None
    board_folds: tuple[str, ...] = ()
    corpus_name: str | None = None
    separator: str = " "
    demo_steps: float = 1.0

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return self.main.name

    @property
    def higher_is_better(self) -> bool:
        return self.main.higher_is_better

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

    def folds(self, config: Mapping[str, Any], source: str) -> list[str | None]:
        """The test folds, each a run of its own; ``[None]`` for a single run.

        Raises:
            ConfigError: a folder of the recipe ``source`` has none.
        """
        return [None] if self.find_folds is None else [*self.find_folds(config, source)]

    def is_task_of(self, downstream: str | None, config: Mapping[str, Any]) -> bool:
        """Whether a recipe with this ``-d`` name is one of this task."""
        name = str(setting(config, f"{EXPERT}.corpus.name")).lower()
        return self.downstream == downstream and self.corpus_name in (None, name)

    def files(self, fold: str | None) -> tuple[str, str]:
        """File names of hypotheses and references in a run's folder."""
        return self.hyp.format(fold=fold), self.ref.format(fold=fold)


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
