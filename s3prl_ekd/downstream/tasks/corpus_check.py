"""Check before a run starts that the corpus of a SUPERB recipe is in the folder the recipe names.

s3prl's recipes join a folder from the YAML with paths from a list (a split file, a table, JSON).
If the folder is one level too high or too deep, s3prl fails with a traceback (SID: ``IndexError``;
ASR: ``AssertionError``). For PR's dev and test sets it fails only at the first evaluation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...files.config import override_option
from ...files.text import CONTROL
from . import task_of
from .lookup import EXPERT, FileLookup, RecipeFiles

_MAX_SUBFOLDERS = 200  # subfolders searched when the files are not in the folder itself
_SAMPLE = 5  # suggest a folder if it has about this many files, evenly spaced in the list


def check_corpus(
    downstream: str | None,
    config: Mapping[str, Any],
    source: str,
    split: str | None = None,
    *,
    folder: Path = Path(),
    fold: str | None = None,
) -> None:
    """Check that every file a recipe lists is in the folder the recipe names.

    Args:
        downstream: the name after ``-d``; only recipes of :data:`TASKS` are checked.
        config: the recipe with the ``-o`` overrides applied.
        source: the recipe's file, for messages.
        split: the split an evaluation runs on; None for training.
        folder: relative paths start here.
        fold: ER's test fold, used if the recipe sets none.

    Raises:
        ConfigError: a path is not set, does not exist or is of the wrong type; a list cannot be
            read; or files are missing. The message gives the first missing file, how many of the
            files exist, and a nearby folder that has them.
    """
    task = task_of(downstream, config)
    if task is None or not isinstance(config.get(EXPERT), Mapping):
        return  # values from a checkpoint may be of any type; s3prl's own check follows
    recipe = RecipeFiles(config, source, folder, split, fold)
    for key in task.folders:
        if not recipe.path(key).is_dir():
            raise recipe.error(key, f"{recipe.value(key)}, which is not an existing folder")
    for key in (*task.lists, *task.recipe_files):
        for path in recipe.paths(key):
            if not path.is_file():
                raise recipe.error(key, f"{path}, which is not an existing file")
    for lookup in task.find_files(recipe):
        _check(recipe, lookup)


def _check(recipe: RecipeFiles, lookup: FileLookup) -> None:
    root = recipe.path(lookup.key)
    if not lookup.names:
        raise ConfigError(f"{recipe.source}: {lookup.listed_in} lists no files")
    missing = [name for name in lookup.names if not lookup.has_file(root, name)]
    if not missing:
        return
    count = len(lookup.names) - len(missing)
    value = Path(recipe.value(lookup.key))
    message = (
        f"{recipe.source}: {lookup.key} is {value}, which has {count:,} of the "
        f"{len(lookup.names):,} files of {lookup.listed_in} (first missing: "
        f"{value / lookup.pattern.format(missing[0])})"
    )
    nearby = None if count else _nearby_folder(root, lookup)
    if nearby is not None:
        path = str(nearby) if value.is_absolute() else os.path.relpath(nearby, recipe.folder)
        option = override_option(lookup.key, path)
        remedy = f"{path} has them: edit the YAML or add {option}"
    elif count:
        remedy = "add the missing files, or create the list again"
    else:
        remedy = f"edit it or add {override_option(lookup.key, 'PATH')}"
    raise ConfigError(CONTROL.sub("?", f"{message}; {remedy}"))


def _nearby_folder(root: Path, lookup: FileLookup) -> Path | None:
    """Find a folder up to two levels above or one below ``root`` that has the files."""
    sample = lookup.names[:: max(1, len(lookup.names) // _SAMPLE)]
    path = Path(os.path.abspath(root))  # not resolved: a symlink's own parent is searched
    try:
        subfolders = sorted(entry.path for entry in os.scandir(path) if entry.is_dir())
    except OSError:
        subfolders = []
    candidates = map(Path, subfolders[:_MAX_SUBFOLDERS])
    for candidate in (path.parent, path.parent.parent, *candidates):
        if all(lookup.has_file(candidate, name) for name in sample):
            return candidate
    return None
