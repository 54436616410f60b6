"""What a user may give as a student: a file, a run's folder, a Hugging Face folder, an id on the
Hub. Commands take any of them where they take a student file: ``-k``, ``superb``, ``features``, ...
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..files.atomic import file_sha256
from ..files.hf_weights import weight_files
from ..files.hub import SETTINGS, fetch, parse_hub_id, pin
from ..files.run_checkpoints import newest_checkpoint, run_checkpoints

if TYPE_CHECKING:
    from ..student_file import LoadedStudent


@dataclass(frozen=True)
class StudentSource:
    """A student that exists on this machine.

    Attributes:
        name: its path, or its pinned id on the Hugging Face Hub.
        path: a student file, a run's checkpoint, or a Hugging Face folder.
    """

    name: str
    path: Path

    def __str__(self) -> str:
        return self.name

    def load(self) -> LoadedStudent:
        """Load it, in eval mode. Raises CheckpointError, for a folder also SetupError."""
        if self.path.is_dir():
            from .hf_student import load_hf_student

            return load_hf_student(self.path, "" if self.name == str(self.path) else self.name)
        from ..student_file import load_student

        return load_student(self.path)

    def sha256(self) -> str:
        """SHA-256 of the file; of a folder, of its settings and weights."""
        return contents_sha256(self.path)


def is_student_folder(path: Path) -> bool:
    """Whether a folder is a Hugging Face folder or the folder of a run with checkpoints."""
    return (path / "config.json").is_file() or bool(run_checkpoints(path))


def check_student(text: str | Path, location: str = "") -> None:
    """Raise CheckpointError unless a student may exist; imports no torch and uses no network."""
    if not Path(text).exists() and parse_hub_id(str(text)) is None:
        raise _no_such_student(text, location)


def find_student(text: str | Path, location: str = "") -> StudentSource:
    """Find a student, and download it if it is on the Hugging Face Hub.

    Args:
        text: a student file, ``states-*.ckpt``, a run's folder (its newest checkpoint), a Hugging
            Face folder, or an id on the Hub.
        location: starts messages, and names ``text``, as ``-k student.pt``.

    Raises:
        CheckpointError: no such student, no checkpoint in the folder, or a failed download.
    """
    path = Path(text)
    if path.is_dir():
        path = _in_folder(path, location)
    elif not path.exists():
        hub_id = parse_hub_id(str(text))
        if hub_id is None:
            raise _no_such_student(text, location)
        model = fetch(hub_id, location or "student", CheckpointError)
        return StudentSource(str(model.id), model.folder)
    return StudentSource(str(path), path)


def pin_student(text: str, location: str = "") -> str:
    """The path or id that means the same student later: of a run's folder, its newest checkpoint
    now; of an id on the Hub, the id with its commit now. Arguments and errors as for
    :func:`find_student`; nothing but an id's ``config.json`` is downloaded."""
    path = Path(text)
    if path.is_dir():
        return str(_in_folder(path, location))
    hub_id = None if path.exists() else parse_hub_id(text)
    return text if hub_id is None else str(pin(hub_id, location or "student", CheckpointError))


def contents_sha256(path: Path) -> str:
    """SHA-256 of a file, or of the settings and weights in a Hugging Face folder.

    Raises:
        CheckpointError: the folder's weights are incomplete.
    """
    if not path.is_dir():
        return file_sha256(path)
    settings = (path / name for name in SETTINGS if (path / name).is_file())
    files = [*settings, *weight_files(path, CheckpointError)]
    names = [f"{file.name} {file_sha256(file)}\n" for file in files]
    return hashlib.sha256("".join(names).encode()).hexdigest()


def _in_folder(folder: Path, location: str) -> Path:
    """A Hugging Face folder itself, or the newest checkpoint of a run. Raises CheckpointError."""
    if (folder / "config.json").is_file():  # a run's folder has no such file
        return folder
    path = newest_checkpoint(folder)
    if path is None:
        raise CheckpointError(
            f"{_prefix(location)}no checkpoints (states-*.ckpt) in {folder}; give the folder of a "
            "run that has saved one, a Hugging Face folder (config.json), or a student file"
        )
    return path


def _no_such_student(text: str | Path, location: str) -> CheckpointError:
    start = location or f"cannot read the student checkpoint {text}"
    return CheckpointError(
        f"{start}: no such file; expected a student file, states-*.ckpt, the folder of a run, a "
        "Hugging Face folder, or an id of the Hugging Face Hub (ORG/NAME or ORG/NAME@REVISION)"
    )


def _prefix(location: str) -> str:
    return f"{location}: " if location else ""
