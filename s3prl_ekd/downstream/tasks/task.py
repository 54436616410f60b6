"""A SUPERB task in s3prl: recipes and their paths, splits, metrics, prediction files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...files.config import value_at
from .lookup import EXPERT, FileLookup, RecipeFiles

if TYPE_CHECKING:
    from ..metrics.sample import Sample  # which imports numpy

HubType = Literal["automatic-speech-recognition", "audio-classification"]
Selection = Literal["dev", "checkpoints", "layers"]
Measure = Callable[[Path, str | None], "tuple[Sample, ...]"]


@dataclass(frozen=True)
class Metric:
    """A metric of a task, in per cent everywhere in this package.

    Attributes:
        name: ``per``, ``wer``, ``acc``, ...
        anchors: of FBANK and of the best system on SUPERB's public set, of which its score is made;
            None for a metric that only chooses checkpoints.
    """

    name: str
    anchors: tuple[float, float] | None
    higher_is_better: bool = False

    @property
    def arrow(self) -> str:
        return "↑" if self.higher_is_better else "↓"


def text_metric(hyp: str, ref: str, unit: str, separator: str = " ") -> Measure:
    """A task's ``measure`` for prediction files with a line ``UTTERANCE TEXT`` for each utterance.

    Args:
        hyp, ref: names of the prediction files; ER's contain ``{fold}``.
        unit: see :func:`..metrics.error_counts.count_errors`.
        separator: between an utterance and its text.
    """
    return partial(_measure_texts, (hyp, ref), unit, separator)


def _measure_texts(
    names: tuple[str, str], unit: str, separator: str, folder: Path, fold: str | None
) -> tuple[Sample, ...]:
    from ..metrics.error_counts import count_errors
    from ..metrics.predictions import read_pairs

    hypotheses, references = (folder / name.format(fold=fold) for name in names)
    return (count_errors(read_pairs(hypotheses, references, separator), unit),)


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
        metrics: the first is the task's main metric.
        measure: (folder of a test's predictions, fold) -> the sample of each metric.
        unit: what its samples resample, in the plural.
        predictions: names of the files and folders that a test leaves in the run's folder; ER's
            contain ``{fold}``.
        archive: file among them -> its place in the archive for SUPERB's board, below predict/; or
            pattern of files -> their folder.
        recipe_files: dotted YAML keys of the files that come with a recipe.
        folders, lists: dotted YAML keys of the corpus paths, which the user sets: of folders, and
            of files that list or describe the corpus.
        find_files: the files that a recipe lists, for :func:`.corpus_check.check_corpus`.
        published_rates: learning rates that ``--lr search`` tries with the full recipe, too.
        selection: how the tested model is chosen. ``dev``: s3prl saves the checkpoint with the
            best dev score. ``checkpoints``: the recipe has no dev set; each checkpoint is tested,
            and the best one counts. ``layers``: nothing is trained; each layer is evaluated on the
            split ``dev``, and the best one is tested.
        best: the checkpoint with the best dev score, written by s3prl.
        dev_metric: the metric of that score; by default the main one.
        scale: factor that converts that score in s3prl's checkpoint to per cent.
        write_reference: (config, split, folder) -> writes the reference of a split into the folder
            of its predictions, for metrics whose reference s3prl does not write.
        modules: modules besides the expert that the recipe imports while it runs.
        find_folds: config -> test folds, each a run of its own; without it, one run.
        board_folds: the folds that SUPERB's board wants.
        corpus_name: ``downstream_expert.corpus.name`` of the recipe, if tasks share a downstream.
        ctc_metric: the name of the main metric in recipes of `-d ctc`; the first metric of such a
            recipe chooses the checkpoint.
        batch_seconds, parameters: of a batch of the full recipe on one GPU, and of the downstream
            model, for the projection of `s3prl-ekd recipe`; ours.
    """

    name: str
    full_name: str
    hub_type: HubType
    downstream: str
    full: str
    tiny: str
    metrics: tuple[Metric, ...]
    measure: Measure
    predictions: tuple[str, ...]
    archive: Mapping[str, str]
    folders: tuple[str, ...]
    find_files: Callable[[RecipeFiles], Iterator[FileLookup]]
    batch_seconds: float
    parameters: float
    lists: tuple[str, ...] = ()
    recipe_files: tuple[str, ...] = ()
    split: str = "test"
    unit: str = "utterances"
    selection: Selection = "dev"
    best: str = "dev-best.ckpt"
    dev_metric: Metric | None = None
    scale: float = 100.0
    write_reference: Callable[[Mapping[str, Any], str, Path], None] | None = None
    modules: tuple[str, ...] = ()
    find_folds: Callable[[Mapping[str, Any], str], list[str]] | None = None
    board_folds: tuple[str, ...] = ()
    corpus_name: str | None = None
    ctc_metric: str | None = None
    published_rates: tuple[float, ...] = ()

    @property
    def main(self) -> Metric:
        return self.metrics[0]

    @property
    def dev(self) -> Metric:
        """The metric by which checkpoints and learning rates are chosen."""
        return self.dev_metric or self.main

    @property
    def columns(self) -> dict[str, Metric]:
        """Name of a column in tables of results -> its metric: ``sf``, ``sf_cer``."""
        first, *others = self.metrics
        return {self.name: first} | {f"{self.name}_{metric.name}": metric for metric in others}

    @property
    def trained(self) -> bool:
        return self.selection != "layers"

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
        """The dev metric at its worst."""
        return 0.0 if self.dev.higher_is_better else 100.0

    def folds(self, config: Mapping[str, Any], source: str) -> list[str | None]:
        """The test folds, each a run of its own; ``[None]`` for a single run.

        Raises:
            ConfigError: a folder of the recipe ``source`` has none.
        """
        return [None] if self.find_folds is None else [*self.find_folds(config, source)]

    def is_task_of(self, downstream: str | None, config: Mapping[str, Any]) -> bool:
        """Whether a recipe with this ``-d`` name is one of this task."""
        name = str(value_at(config, f"{EXPERT}.corpus.name")).lower()
        return self.downstream == downstream and self.corpus_name in (None, name)

    def files(self, fold: str | None) -> tuple[str, ...]:
        """Names of the files and folders that a test leaves."""
        return tuple(name.format(fold=fold) for name in self.predictions)


def recipe_paths(config: Mapping[str, Any], keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield ``(key, path)`` for each path set under the dotted ``keys``."""
    for key in keys:
        value = value_at(config, key)
        for path in value if isinstance(value, list) else [] if value is None else [value]:
            yield key, str(path)


def missing_paths(
    config: Mapping[str, Any], keys: Sequence[str], folder: Path
) -> Iterator[tuple[str, str]]:
    """Yield ``(key, path)`` for each path in ``config`` that does not exist below ``folder``."""
    return ((key, path) for key, path in recipe_paths(config, keys) if not (folder / path).exists())
