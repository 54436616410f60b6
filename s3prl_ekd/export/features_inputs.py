"""Which audio files are meant, and what each is called in the features file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from ..data.audio_files import find_audio
from ..errors import DataError
from ..files.text import read_text


def collect_audio(given: Sequence[str], lists: Sequence[Path] = ()) -> dict[str, Path]:
    """Files, folders and lists of files -> ``{key: path}``.

    The key of a file in a folder is its path inside that folder; the key of a file that is named,
    on the command line or in a list, is its path as it is written there. Always with ``/``.

    Raises:
        DataError: nothing is there, a list cannot be read, or two files have one key.
    """
    found: dict[str, Path] = {}

    def add(key: str, path: Path) -> None:
        if key in found:
            raise DataError(
                f"{found[key]} and {path} would both be called {key}; give the folder above both, "
                "or write two files"
            )
        found[key] = path

    for text in given:
        path = Path(text)
        if path.is_dir():
            for name in find_audio(path):
                add(name, path / name)
        else:
            add(PurePath(text).as_posix(), path)
    for listed in lists:
        for text in _lines(listed):
            add(PurePath(text).as_posix(), Path(text))
    if not found:
        raise DataError("there are no audio files in what was given (.flac .wav .ogg .opus)")
    return found


def _lines(path: Path) -> list[str]:
    text = read_text(path, "list", DataError, limit=1 << 28, utf8="utf-8-sig")
    return [line.strip() for line in text.splitlines() if line.strip()]
