"""QbE: query by example on the English part of QUESST 2014: spoken queries in documents, by DTW."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ...files.config import value_at
from ...prepare.qbe import (
    DOCUMENTS,
    QUERIES,
    TRUTH,
    check_truth,
    english,
    read_audio_list,
    read_truth,
)
from .lookup import EXPERT, FileLookup, RecipeFiles, file_finder
from .task import Metric, Task

if TYPE_CHECKING:
    from ..metrics.sample import Sample

_ROOT = f"{EXPERT}.datarc.dataset_root"
_DTW = f"{EXPERT}.dtwrc"
_SCORES, _REFERENCE = "benchmark.stdlist.xml", "benchmark.reference.txt"


def _check_settings(recipe: RecipeFiles) -> None:
    """Raise ConfigError for settings at which s3prl fails with a traceback."""
    distance, pattern = recipe.value(f"{_DTW}.dist_method"), recipe.value(f"{_DTW}.step_pattern")
    if distance == "cosine_neg_log" and value_at(recipe.config, f"{EXPERT}.feature_normalization"):
        raise ConfigError(
            f"{recipe.source}: {_DTW}.dist_method cosine_neg_log needs {EXPERT}."
            "feature_normalization: False"
        )
    if value_at(recipe.config, f"{_DTW}.subsequence") and pattern != "asymmetric":
        raise ConfigError(
            f"{recipe.source}: {_DTW}.subsequence needs step_pattern asymmetric, got "
            f"{pattern!r:.40}"
        )
    key = f"{EXPERT}.max_workers"
    workers = value_at(recipe.config, key)
    if workers is not None and (type(workers) is not int or workers < 1):
        raise ConfigError(
            f"{recipe.source}: {key} must be 1 or more, or empty for all CPUs, got {workers!r:.40}"
        )


def _find_files(recipe: RecipeFiles) -> Iterator[FileLookup]:
    _check_settings(recipe)
    root, has_file = recipe.path(_ROOT), file_finder()
    splits = [split for split in QUERIES if recipe.split in (None, split)]
    lists = [DOCUMENTS, *(QUERIES[split] for split in splits)]
    yield FileLookup(_ROOT, lists, "QUESST's lists", has_file)
    try:
        documents, *queries = (read_audio_list(root / name, ConfigError) for name in lists)
        names = {line.name for line in english(documents)}
        for split, own in zip(splits, queries, strict=True):
            for line in english(own):
                if line.name in names:
                    raise ConfigError(f"{line.location}: {line.name} is a document's name, too")
            truth = read_truth(root / TRUTH[split], ConfigError)
            check_truth(truth, own, documents, root / TRUTH[split], ConfigError)
    except ConfigError as error:
        raise ConfigError(f"{recipe.source}: {error}") from None
    for name, lines in zip(lists, (documents, *queries), strict=True):
        paths = [line.path for line in english(lines)]
        yield FileLookup(_ROOT, paths, str(root / name), has_file)


def _write_reference(config: Mapping[str, Any], split: str, folder: Path) -> None:
    from ..metrics.mtwv import Reference, write_reference

    root = Path(str(value_at(config, _ROOT)))
    documents = read_audio_list(root / DOCUMENTS, ConfigError)
    reference = Reference(len(documents), read_truth(root / TRUTH[split], ConfigError))
    write_reference(reference, folder / _REFERENCE)


def _measure(folder: Path, fold: str | None) -> tuple[Sample, ...]:
    from ..metrics.mtwv import measure_detections, read_reference, read_scores

    reference = read_reference(folder / _REFERENCE)
    return (measure_detections(read_scores(folder / _SCORES), reference),)


QBE = Task(
    name="qbe",
    full_name="query by example",
    hub_type="audio-classification",
    downstream="quesst14_dtw",
    full="downstream/quesst14_dtw/config.yaml",
    tiny="downstream/quesst14_dtw/tiny.yaml",
    metrics=(Metric("mtwv", (0.58, 7.36), higher_is_better=True),),
    measure=_measure,
    unit="queries",
    predictions=(_SCORES, _REFERENCE),
    archive={_SCORES: f"qbe_public/{_SCORES}"},
    folders=(_ROOT,),
    find_files=_find_files,
    selection="layers",
    write_reference=_write_reference,
    batch_seconds=0.05,  # an utterance of a split, of one layer
    parameters=0,
)
