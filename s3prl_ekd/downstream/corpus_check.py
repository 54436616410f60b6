"""Check before a run starts that the corpus of a SUPERB recipe is in the folder the recipe names.

s3prl's recipes join a folder from the YAML with paths from a list (a split file, a table, JSON).
If the folder is one level too high or too deep, s3prl fails with a traceback (SID: ``IndexError``;
ASR: ``AssertionError``). For PR's dev and test sets it fails only at the first evaluation.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..compat.no_eval import run_splits
from ..data.manifest import MAX_LIST
from ..errors import ConfigError
from ..files.config import override_option
from ..files.text import CONTROL, read_text
from .tasks import EXPERT, setting, task_of

_OPTIONAL = f"{EXPERT}.datarc.dict_path"  # s3prl has a default dictionary
_MAX_SUBFOLDERS = 200  # subfolders searched when the files are not in the folder itself
_MAX_DEPTH = 3  # levels below a LibriSpeech set: speaker, chapter, and one more
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
        downstream: the name after ``-d``; only SUPERB's four recipes are checked.
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
    task = task_of(downstream)
    if task is None or not isinstance(config.get(EXPERT), Mapping):
        return  # values from a checkpoint may be of any type; s3prl's own check follows
    if task.name == "pr" and str(setting(config, f"{EXPERT}.corpus.name")).lower() != "libriphone":
        return  # another of s3prl's corpora
    recipe = _Recipe(config, source, folder)
    for key in task.folders:
        if not recipe.path(key).is_dir():
            raise recipe.error(key, f"{recipe.value(key)}, which is not an existing folder")
    for key in (*task.lists, *task.recipe_files):
        for path in recipe.paths(key):
            if not path.is_file():
                raise recipe.error(key, f"{path}, which is not an existing file")
    if task.name == "sid":
        lookups = _sid(recipe)
    elif task.name == "er":
        lookups = _er(recipe, fold)
    else:
        splits = [split] if split else [name for _, name in run_splits(config)]
        lookups = (_asr if task.name == "asr" else _pr)(recipe, splits)
    for lookup in lookups:
        _check(recipe, lookup)


@dataclass(frozen=True)
class _Recipe:
    """A recipe, with its file name for messages. Keys are dotted and start at the top."""

    config: Mapping[str, Any]
    source: str
    folder: Path

    def value(self, key: str) -> Any:
        value = setting(self.config, key)
        if value is None and key != _OPTIONAL:
            raise ConfigError(
                f"{self.source}: {key} is not set; add {override_option(key, 'PATH')}"
            )
        return value

    def paths(self, key: str) -> list[Path]:
        value = self.value(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for text in values:
            if not isinstance(text, str) or not text or "\0" in text:
                raise self.error(key, f"{text!r:.80}, expected a path")
        return [self.folder / text for text in values]

    def path(self, key: str) -> Path:
        if not isinstance(self.value(key), str):
            raise self.error(key, f"{self.value(key)!r:.80}, expected a path")
        return self.paths(key)[0]

    def sets(self, section: str, splits: Sequence[str]) -> list[str]:
        """The corpus sets of the splits, such as ``["train-clean-100"]``."""
        sets: dict[str, None] = {}
        for key in (f"{EXPERT}.{section}.{split}" for split in splits):
            value = self.value(key)
            names = [value] if isinstance(value, str) else value
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise self.error(key, f"{value!r:.80}, expected a list of names")
            sets.update(dict.fromkeys(names))
        return list(sets)

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(
            f"{self.source}: {key} is {CONTROL.sub('?', problem)}; edit it or add "
            f"{override_option(key, 'PATH')}"
        )


@dataclass(frozen=True)
class _Lookup:
    """Files that must exist below one folder.

    Attributes:
        key: the folder's YAML key.
        names: the file names as listed.
        listed_in: the file or the sets that list them.
        has_file: returns whether a folder contains a file name.
        pattern: a file's path below the folder, for messages.
    """

    key: str
    names: Sequence[str]
    listed_in: str
    has_file: Callable[[Path, str], bool]
    pattern: str = "{}"


def _check(recipe: _Recipe, lookup: _Lookup) -> None:
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


def _nearby_folder(root: Path, lookup: _Lookup) -> Path | None:
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


def _sid(recipe: _Recipe) -> Iterator[_Lookup]:
    path = recipe.path(f"{EXPERT}.datarc.meta_data")
    names = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        fields = line.split()
        if len(fields) < 2 or not fields[0].isdecimal() or fields[1].count("/") != 2:
            raise ConfigError(
                f"{recipe.source}: {path} line {number}: expected '1 id10001/VIDEO/UTTERANCE.wav', "
                f"got {line.strip()[:60]!r}"
            )
        if fields[0] in ("1", "2", "3"):  # s3prl ignores other numbers
            names.append(fields[1])
    listing = _listings()

    @cache
    def parts(root: Path) -> list[Path]:
        wavs = (root / name / "wav" for name in sorted(listing(root)))
        return [wav for wav in wavs if wav.is_dir()]

    def has_file(root: Path, name: str) -> bool:
        video, _, file = name.rpartition("/")
        return any(file in listing(part / video) for part in parts(root))

    yield _Lookup(f"{EXPERT}.datarc.file_path", names, str(path), has_file, "*/wav/{}")


def _er(recipe: _Recipe, fold: str | None) -> Iterator[_Lookup]:
    key = f"{EXPERT}.datarc.meta_data"
    fold = setting(recipe.config, f"{EXPERT}.datarc.test_fold") or fold or "fold1"
    session = str(fold).replace("fold", "Session")
    tables = [f"{session}/{part}_meta_data.json" for part in ("train", "test")]
    has_file = _file_finder()
    yield _Lookup(key, tables, f"test_fold {fold}", has_file)
    for path in (recipe.path(key) / table for table in tables):
        try:
            names = [entry["path"] for entry in json.loads(_read(path))["meta_data"]]
            if not all(isinstance(name, str) for name in names):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(
                f"{recipe.source}: {path} is not in the format that s3prl's preprocess.py writes; "
                "create it again with s3prl-ekd prepare er or iemocap"
            ) from None
        yield _Lookup(f"{EXPERT}.datarc.root", names, str(path), has_file)


def _asr(recipe: _Recipe, splits: Sequence[str]) -> Iterator[_Lookup]:
    key = f"{EXPERT}.datarc.bucket_file"
    tables = [f"{name}.csv" for name in recipe.sets("datarc", splits)]
    has_file = _file_finder()
    yield _Lookup(key, tables, f"the sets of {', '.join(splits)}", has_file)
    for path in (recipe.path(key) / table for table in tables):
        rows = csv.DictReader(_read(path).splitlines())
        if "file_path" not in (rows.fieldnames or ()):
            raise ConfigError(
                f"{recipe.source}: {path} has no column file_path; create it again with s3prl-ekd "
                "prepare asr or librispeech"
            )
        names = [row["file_path"] or "" for row in rows]
        folders = {os.path.dirname(name): None for name in names}
        transcripts = [f"{name}/{'-'.join(name.split('/')[-2:])}.trans.txt" for name in folders]
        yield _Lookup(f"{EXPERT}.datarc.libri_root", [*names, *transcripts], str(path), has_file)


def _pr(recipe: _Recipe, splits: Sequence[str]) -> Iterator[_Lookup]:
    def has_file(root: Path, name: str) -> bool:
        top = root / name
        for folder, subfolders, files in os.walk(top, followlinks=True):
            if any(file.endswith(".trans.txt") for file in files):
                return True
            if len(Path(folder).relative_to(top).parts) >= _MAX_DEPTH:
                subfolders.clear()
        return False

    sets, listed_in = recipe.sets("corpus", splits), f"the sets of {', '.join(splits)}"
    yield _Lookup(f"{EXPERT}.corpus.path", sets, listed_in, has_file, "{}/*/*/*.trans.txt")


def _listings() -> Callable[[Path], frozenset[str]]:
    """Return a function that lists a folder once: a corpus may be on a slow disk."""

    @cache
    def listing(folder: Path) -> frozenset[str]:
        try:
            return frozenset(os.listdir(folder))
        except OSError:
            return frozenset()

    return listing


def _file_finder() -> Callable[[Path, str], bool]:
    """Return a function that checks if a folder has a file; the name may contain folders."""
    listing = _listings()
    return lambda root, name: os.path.basename(name) in listing((root / name).parent)


def _read(path: Path) -> str:
    return read_text(path, "list of files", ConfigError, MAX_LIST, utf8="utf-8-sig")
