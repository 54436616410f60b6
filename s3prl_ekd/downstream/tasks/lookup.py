"""The files that a recipe's lists name, and the paths of a recipe.

s3prl's recipes join a folder from the YAML with paths from a list (a split file, a table, JSON). A
task yields a :class:`FileLookup` for each folder and list; :mod:`.corpus_check` looks them up.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...compat.no_eval import run_splits
from ...data.manifest import MAX_LIST
from ...errors import ConfigError
from ...files.config import override_option, split_overrides, value_at
from ...files.text import CONTROL, read_text

EXPERT = "downstream_expert"
_OPTIONAL = f"{EXPERT}.datarc.dict_path"  # s3prl has a default dictionary


def check_override_keys(data: Mapping[str, Any], overrides: str | None, source: str) -> None:
    """Check for misspelt keys: s3prl ignores keys that it does not know.

    A key that ``data`` lacks may be right, so only one that is nearly a key of the same section is
    an error.

    Raises:
        ConfigError: names the key of ``source`` that is probably meant.
    """
    for key, _, _ in split_overrides(overrides):
        section: Any = data
        for name in key.split(".")[1:]:
            if not key.startswith("config.") or not isinstance(section, Mapping):
                break
            if name not in section:
                close = difflib.get_close_matches(name, map(str, section), n=1, cutoff=0.85)
                if close:
                    raise ConfigError(
                        f"-o {key}: {source} has no {name} there; did you mean {close[0]}?"
                    )
            section = section.get(name)


@dataclass(frozen=True)
class RecipeFiles:
    """A recipe, with its file name for messages. Keys are dotted and start at the top.

    The methods raise ConfigError if a value is missing or of the wrong type.
    """

    config: Mapping[str, Any]
    source: str
    folder: Path
    split: str | None = None  # that an evaluation runs on; None for training
    fold: str | None = None  # of the test, if the recipe sets none

    @property
    def splits(self) -> list[str]:
        """The splits that the run reads: train, and those it evaluates on."""
        return [self.split] if self.split else [name for _, name in run_splits(self.config)]

    def value(self, key: str) -> Any:
        value = value_at(self.config, key)
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

    def sets(self, section: str) -> list[str]:
        """The corpus sets of the splits, such as ``["train-clean-100"]``."""
        sets: dict[str, None] = {}
        for key in (f"{EXPERT}.{section}.{split}" for split in self.splits):
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
class FileLookup:
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


def folder_listing() -> Callable[[Path], frozenset[str]]:
    """Return a function that lists a folder once: a corpus may be on a slow disk."""

    @cache
    def listing(folder: Path) -> frozenset[str]:
        try:
            return frozenset(os.listdir(folder))
        except OSError:
            return frozenset()

    return listing


def file_finder() -> Callable[[Path, str], bool]:
    """Return a function that checks if a folder has a file; the name may contain folders."""
    listing = folder_listing()
    return lambda root, name: os.path.basename(name) in listing((root / name).parent)


def read_list(path: Path) -> str:
    return read_text(path, "list of files", ConfigError, MAX_LIST, utf8="utf-8-sig")
