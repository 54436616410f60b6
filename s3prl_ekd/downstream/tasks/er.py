"""ER: emotion recognition on IEMOCAP, a run for each of its sessions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...files.config import value_at
from ...prepare.er import natural_sort_key
from .lookup import EXPERT, FileLookup, RecipeFiles, file_finder, read_list
from .task import Metric, Task, text_metric

_META = f"{EXPERT}.datarc.meta_data"


def _find_files(recipe: RecipeFiles) -> Iterator[FileLookup]:
    key = _META
    fold = value_at(recipe.config, f"{EXPERT}.datarc.test_fold") or recipe.fold or "fold1"
    session = str(fold).replace("fold", "Session")
    tables = [f"{session}/{part}_meta_data.json" for part in ("train", "test")]
    has_file = file_finder()
    yield FileLookup(key, tables, f"test_fold {fold}", has_file)
    for path in (recipe.path(key) / table for table in tables):
        try:
            names = [entry["path"] for entry in json.loads(read_list(path))["meta_data"]]
            if not all(isinstance(name, str) for name in names):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(
                f"{recipe.source}: {path} is not in the format that s3prl's preprocess.py writes; "
                "create it again with s3prl-ekd prepare er or iemocap"
            ) from None
        yield FileLookup(f"{EXPERT}.datarc.root", names, str(path), has_file)


def _find_folds(config: Mapping[str, Any], source: str) -> list[str]:
    """``fold1``, ``fold2``, ... for each session with metadata."""
    meta = Path(str(value_at(config, _META)))
    sessions = [path.name for path in meta.glob("Session*")]
    if not sessions:
        raise ConfigError(f"{source}: {meta} has no Session1, Session2, ...")
    return [name.replace("Session", "fold") for name in sorted(sessions, key=natural_sort_key)]


_PREDICTIONS = ("test_{fold}_predict.txt", "test_{fold}_truth.txt")

ER = Task(
    name="er",
    full_name="emotion recognition",
    hub_type="audio-classification",
    downstream="emotion",
    full="downstream/emotion/config.yaml",
    tiny="downstream/emotion/tiny.yaml",
    metrics=(Metric("acc", (48.23672168, 67.62), higher_is_better=True),),
    measure=text_metric(*_PREDICTIONS, "label"),
    predictions=_PREDICTIONS,
    archive={"test_{fold}_predict.txt": "er_{fold}_public/predict.txt"},
    folders=(f"{EXPERT}.datarc.root", _META),
    find_files=_find_files,
    batch_seconds=0.06,
    parameters=0.2e6,
    find_folds=_find_folds,
    board_folds=tuple(f"fold{i}" for i in range(1, 6)),
)
