"""Where a user's corpora lie, checked, and which keys of which files say so."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError, DataError
from .yaml_edit import Value, get

_AWKWARD = re.compile(r"""['"$`\\!=]|,,""")
PREPARED = "data/librispeech"  # what the recipes call it: `prepare librispeech DIR -o` this


@dataclass(frozen=True)
class Corpora:
    """Absolute paths; None or nothing where the user named none."""

    librispeech: Path | None = None
    voxceleb1: Path | None = None
    iemocap: Path | None = None
    lexicon: Sequence[Path] = ()

    def __bool__(self) -> bool:
        return bool(self.librispeech or self.voxceleb1 or self.iemocap or self.lexicon)

    def check(self) -> None:
        """Raise DataError, with the option's name, where one is not what it should be."""
        from .prepare import iemocap, librispeech
        from .prepare import sid as voxceleb1
        from .prepare.lexicon import read_lexicon

        for option, path, look in (
            ("librispeech", self.librispeech, librispeech.check_shape),
            ("voxceleb1", self.voxceleb1, voxceleb1.check_shape),
            ("iemocap", self.iemocap, iemocap.check_shape),
            ("lexicon", self.lexicon or None, lambda paths: read_lexicon(paths, ())),
        ):
            if path is not None:
                try:
                    look(path)
                except DataError as error:
                    raise DataError(f"--{option}: {error}") from None

    def values(self) -> dict[str, dict[str, Value]]:
        """File below the working folder -> dotted key -> what belongs there."""
        found: dict[str, dict[str, Value]] = {}

        def put(file: str, key: str, value: Value) -> None:
            found.setdefault(file, {})[key] = value

        if self.librispeech:
            root = str(self.librispeech)
            put("pretrain/ekd/config_runner.yaml", "pretrain_expert.datarc.libri_root", root)
            tables = f"./{PREPARED}/len_for_bucket"
            put("pretrain/ekd/config_runner.yaml", "pretrain_expert.datarc.file_path", tables)
            put("downstream/asr/config.yaml", "downstream_expert.datarc.libri_root", root)
            put("downstream/ctc/libriphone.yaml", "downstream_expert.corpus.path", root)
        if self.lexicon:
            files = [str(path) for path in self.lexicon]
            put("downstream/ctc/libriphone.yaml", "downstream_expert.corpus.lexicon", files)
        if self.voxceleb1:
            root = str(self.voxceleb1)
            put("downstream/voxceleb1/config.yaml", "downstream_expert.datarc.file_path", root)
        if self.iemocap:
            root = str(self.iemocap)
            put("downstream/emotion/config.yaml", "downstream_expert.datarc.root", root)
        return found

    def commands(self) -> list[str]:
        """What to type next, for each corpus."""
        lines = []
        if self.librispeech:
            words = ["librispeech", str(self.librispeech), "-o", PREPARED]
            lines.append(
                [*words, *([] if self.lexicon else ["--lexicon", "cmudict.dict", "--g2p"])]
            )
        if self.voxceleb1:
            words = [str(self.voxceleb1), "iden_split.txt"]
            lines.append(["voxceleb1", *words, "-o", "data/voxceleb1"])
        if self.iemocap:
            lines.append(["iemocap", str(self.iemocap), "-o", "data/iemocap"])
        return [shlex.join(["s3prl-ekd", "prepare", *words]) for words in lines]


def absolute(path: Path | None) -> Path | None:
    """As the user means it, from the folder in which the command is typed."""
    return None if path is None else Path(os.path.abspath(path.expanduser()))


def other_values(root: Path, corpora: Corpora) -> list[str]:
    """A line for each key of a file in ``root`` that says something else than ``corpora``."""
    lines = []
    for file, wanted in corpora.values().items():
        for key, value in wanted.items():
            try:
                there = get((root / file).read_text(encoding="utf-8"), key)
            except (ConfigError, OSError, UnicodeDecodeError) as error:
                lines.append(f"{file} cannot be read ({error}); {key} belongs there")
                continue
            if there != value:
                lines.append(f"{file} was kept and has {key}: {there}; {_remedy(key, value)}")
    return lines


def _remedy(key: str, value: Value) -> str:
    text = f'-o "config.{key}={value!r}"'
    if _AWKWARD.search(str(value) if isinstance(value, str) else "".join(value)):
        return f"it should be {value}"  # a shell or s3prl would read something else
    return f"edit it, or add to the command {text}"
