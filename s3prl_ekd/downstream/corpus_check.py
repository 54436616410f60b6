"""Whether the corpus that a SUPERB recipe names is where the recipe says, before anything starts.

s3prl's recipes join a folder of the YAML with the paths of a list (a split file, a table, JSON).
With a folder one level too high or too deep they end in a traceback (SID: an ``IndexError``; ASR:
an ``AssertionError``), PR's dev and test only at the first evaluation.
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
from ..errors import ConfigError
from ..files.config import typed
from ..files.text import CONTROL, read_text

MAX_LIST = 256 << 20  # bytes of a list of files; VoxCeleb1's has 5 million
_EXPERT = "downstream_expert"
_FOLDERS = {
    "ctc": ("corpus.path",),
    "voxceleb1": ("datarc.file_path",),
    "emotion": ("datarc.root", "datarc.meta_data"),
    "asr": ("datarc.libri_root", "datarc.bucket_file"),
}
_FILES = {
    "ctc": ("corpus.lexicon", "text.vocab_file"),
    "voxceleb1": ("datarc.meta_data",),
    "asr": ("datarc.dict_path",),
}
_OPTIONAL = {"datarc.dict_path"}  # s3prl brings one
_NEIGHBOURS = 200  # folders below the one named in which the files are looked for
_DEEPEST = 3  # levels below a set of LibriSpeech: speaker, chapter, and one more
_SAMPLE = 5  # files of which all must be there for a neighbour to be proposed


def check_corpus(
    downstream: str | None,
    config: Mapping[str, Any],
    where: str,
    split: str | None = None,
    *,
    folder: Path = Path(),
    fold: str | None = None,
) -> None:
    """See that every file that a recipe lists is in the folder that it names.

    Args:
        downstream: the name after ``-d``; only the four of SUPERB are checked.
        config: the recipe, with ``-o`` put in.
        where: the recipe's file, for messages.
        split: of a run that only evaluates, which; None: this run trains.
        folder: that relative paths start at.
        fold: of ER, where the recipe names none.

    Raises:
        ConfigError: a path is not set, not there, or of the wrong kind; a list cannot be read; or
            files are missing. It says what was looked for, how many of how many are there, and the
            folder one level up or down that has them.
    """
    expert = config.get(_EXPERT)
    if not isinstance(downstream, str) or not isinstance(expert, Mapping):
        return  # a checkpoint may say anything; s3prl's own check follows
    if downstream not in _FOLDERS:
        return
    corpus = expert.get("corpus")
    name = corpus.get("name") if isinstance(corpus, Mapping) else None
    if downstream == "ctc" and str(name).lower() != "libriphone":
        return  # another corpus of s3prl's
    recipe = _Recipe(expert, where, folder)
    for key in _FOLDERS[downstream]:
        if not recipe.path(key).is_dir():
            raise recipe.error(key, f"{recipe.value(key)}, which is no folder that is there")
    for key in _FILES.get(downstream, ()):
        for path in recipe.paths(key):
            if not path.is_file():
                raise recipe.error(key, f"{path}, which is no file that is there")
    if downstream == "voxceleb1":
        lookups: Iterator[_Lookup] = _sid(recipe)
    elif downstream == "emotion":
        lookups = _er(recipe, fold)
    else:
        splits = [split] if split else [name for _, name in run_splits(config)]
        lookups = (_asr if downstream == "asr" else _pr)(recipe, splits)
    for lookup in lookups:
        _check(recipe, lookup)


@dataclass(frozen=True)
class _Recipe:
    """The section ``downstream_expert`` of a recipe, and how messages name it."""

    expert: Mapping[str, Any]
    where: str
    folder: Path

    def value(self, key: str) -> Any:
        value: Any = self.expert
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None and key not in _OPTIONAL:
            raise ConfigError(f"{self.where}: {_EXPERT}.{key} is not set; add {_typed(key)}")
        return value

    def paths(self, key: str) -> list[Path]:
        value = self.value(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for text in values:
            if not isinstance(text, str) or not text or "\0" in text:
                raise self.error(key, f"{text!r:.80}; a path is needed")
        return [self.folder / text for text in values]

    def path(self, key: str) -> Path:
        if not isinstance(self.value(key), str):
            raise self.error(key, f"{self.value(key)!r:.80}; a path is needed")
        return self.paths(key)[0]

    def names(self, key: str) -> list[str]:
        """A list of sets (``["train-clean-100"]``)."""
        value = self.value(key)
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.error(key, f"{value!r:.80}; a list of names is needed")
        return value

    def error(self, key: str, what: str) -> ConfigError:
        return ConfigError(
            f"{self.where}: {_EXPERT}.{key} is {CONTROL.sub('?', what)}; edit it or add "
            f"{_typed(key)}"
        )


@dataclass(frozen=True)
class _Lookup:
    """Files that must be below one folder.

    Attributes:
        key: of that folder.
        names: of the files, as the list has them.
        source: what lists them.
        has_file: whether a folder has it.
        shape: of a file's path below the folder, for messages.
    """

    key: str
    names: Sequence[str]
    source: str
    has_file: Callable[[Path, str], bool]
    shape: str


def _check(recipe: _Recipe, lookup: _Lookup) -> None:
    root = recipe.path(lookup.key)
    if not lookup.names:
        raise ConfigError(f"{recipe.where}: {lookup.source} names no files")
    missing = [name for name in lookup.names if not lookup.has_file(root, name)]
    if not missing:
        return
    count = len(lookup.names) - len(missing)
    key, value = f"{_EXPERT}.{lookup.key}", Path(recipe.value(lookup.key))
    message = (
        f"{recipe.where}: {key} is {value}, which has {count:,} of the {len(lookup.names):,} files "
        f"of {lookup.source} (the first one missing: {value / lookup.shape.format(missing[0])})"
    )
    fitting = None if count else _neighbour(root, lookup)
    if fitting is not None:
        proposed = fitting if value.is_absolute() else os.path.relpath(fitting, recipe.folder)
        remedy = (
            f"give {proposed}, which has them: edit the YAML or add {typed(key, str(proposed))}"
        )
    elif count:
        remedy = "put what is missing there, or make the list again"
    else:
        remedy = f"edit it or add {_typed(lookup.key)}"
    raise ConfigError(CONTROL.sub("?", f"{message}; {remedy}"))


def _neighbour(root: Path, lookup: _Lookup) -> Path | None:
    """A folder up to two levels above or one below that has the files."""
    step = max(1, len(lookup.names) // _SAMPLE)
    sample = lookup.names[::step]
    path = Path(os.path.abspath(root))  # not resolved: a link's own parent counts
    try:
        below = sorted(entry.path for entry in os.scandir(path) if entry.is_dir())
    except OSError:
        below = []
    for other in (path.parent, path.parent.parent, *map(Path, below[:_NEIGHBOURS])):
        if all(lookup.has_file(other, name) for name in sample):
            return other
    return None


def _sid(recipe: _Recipe) -> Iterator[_Lookup]:
    path = recipe.path("datarc.meta_data")
    names = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        fields = line.split()
        if len(fields) < 2 or not fields[0].isdecimal() or fields[1].count("/") != 2:
            raise ConfigError(
                f"{recipe.where}: {path} line {number} is not of the form "
                f"'1 id10001/VIDEO/UTTERANCE.wav': {line.strip()[:60]!r}"
            )
        if fields[0] in ("1", "2", "3"):  # s3prl passes over others
            names.append(fields[1])
    listing = _listings()

    @cache
    def parts(root: Path) -> list[Path]:
        wavs = (root / name / "wav" for name in sorted(listing(root)))
        return [wav for wav in wavs if wav.is_dir()]

    def has_file(root: Path, name: str) -> bool:
        video, _, file = name.rpartition("/")
        return any(file in listing(part / video) for part in parts(root))

    yield _Lookup("datarc.file_path", names, str(path), has_file, "*/wav/{}")


def _er(recipe: _Recipe, fold: str | None) -> Iterator[_Lookup]:
    fold = recipe.expert["datarc"].get("test_fold") or fold or "fold1"
    session = str(fold).replace("fold", "Session")
    tables = [f"{session}/{part}_meta_data.json" for part in ("train", "test")]
    has_file = _file_finder()
    yield _Lookup("datarc.meta_data", tables, f"test_fold {fold}", has_file, "{}")
    for table in tables:
        path = recipe.path("datarc.meta_data") / table
        try:
            names = [entry["path"] for entry in json.loads(_read(path))["meta_data"]]
            if not all(isinstance(name, str) for name in names):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(
                f"{recipe.where}: {path} is not of the form that s3prl's preprocess.py writes; "
                "make it again with s3prl-ekd prepare er or iemocap"
            ) from None
        yield _Lookup("datarc.root", names, str(path), has_file, "{}")


def _asr(recipe: _Recipe, splits: Sequence[str]) -> Iterator[_Lookup]:
    sets = {name: None for split in splits for name in recipe.names(f"datarc.{split}")}
    tables = [f"{name}.csv" for name in sets]
    has_file = _file_finder()
    yield _Lookup("datarc.bucket_file", tables, f"the sets of {', '.join(splits)}", has_file, "{}")
    for table in tables:
        path = recipe.path("datarc.bucket_file") / table
        rows = csv.DictReader(_read(path).splitlines())
        if "file_path" not in (rows.fieldnames or ()):
            raise ConfigError(
                f"{recipe.where}: {path} has no column file_path; make it again with s3prl-ekd "
                "prepare asr or librispeech"
            )
        names = [row["file_path"] or "" for row in rows]
        folders = {os.path.dirname(name): None for name in names}
        transcripts = [f"{name}/{'-'.join(name.split('/')[-2:])}.trans.txt" for name in folders]
        yield _Lookup("datarc.libri_root", [*names, *transcripts], str(path), has_file, "{}")


def _pr(recipe: _Recipe, splits: Sequence[str]) -> Iterator[_Lookup]:
    sets = {name: None for split in splits for name in recipe.names(f"corpus.{split}")}

    def has_file(root: Path, name: str) -> bool:
        top = root / name
        for folder, folders, files in os.walk(top, followlinks=True):
            if any(file.endswith(".trans.txt") for file in files):
                return True
            if len(Path(folder).relative_to(top).parts) >= _DEEPEST:
                folders.clear()
        return False

    source = f"the sets of {', '.join(splits)}"
    yield _Lookup("corpus.path", list(sets), source, has_file, "{}/*/*/*.trans.txt")


def _listings() -> Callable[[Path], frozenset[str]]:
    """The names in a folder, each folder being listed once: a corpus may be on a slow disk."""

    @cache
    def listing(folder: Path) -> frozenset[str]:
        try:
            return frozenset(os.listdir(folder))
        except OSError:
            return frozenset()

    return listing


def _file_finder() -> Callable[[Path, str], bool]:
    """Whether a folder has a file of a name, which may hold folders; of one list of files."""
    listing = _listings()
    return lambda root, name: os.path.basename(name) in listing((root / name).parent)


def _read(path: Path) -> str:
    return read_text(path, "list of files", ConfigError, MAX_LIST, utf8="utf-8-sig")


def _typed(key: str) -> str:
    return typed(f"{_EXPERT}.{key}", "PATH")
