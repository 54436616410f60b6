"""The reports of commands, such as ``cost -o FILE``: a command replaces only its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import SetupError
from .atomic import explain_write_errors, make_folder, write_text


def check_report(path: Path, begin: str) -> None:
    """Check that a report can be written at ``path``, and create its folder.

    Args:
        begin: how all reports of the command begin; a file that begins otherwise is not replaced.

    Raises:
        SetupError: ``path`` is a folder or a file that the command did not write, or its folder
            cannot be made.
    """
    if path.is_dir():
        raise SetupError(f"cannot write {path}: it is a folder, expected a file name")
    make_folder(path.parent, SetupError)
    if path.exists() and not (path.is_file() and _begins(path, begin.encode())):
        raise _not_ours(path)


def check_beside(report: Path, *names: str) -> None:
    """Check that files are there only if ``report``, which is written with them, is there, too.

    Raises:
        SetupError: a file that the command did not write.
    """
    for path in (report.with_name(name) for name in names):
        if path.exists() and not report.exists():
            raise _not_ours(path)


def _not_ours(path: Path) -> SetupError:
    return SetupError(
        f"{path} exists and was not written by this command; choose another name, or remove it"
    )


def _begins(path: Path, begin: bytes) -> bool:
    with explain_write_errors(path), path.open("rb") as file:
        return file.read(len(begin)) == begin
    return False


def json_begin(key: str) -> str:
    """How a report begins whose first key is ``key``; see :func:`write_report`."""
    return json.dumps({key: 0}, indent=1).rpartition(":")[0]


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON atomically, replacing an existing file, and print its path."""
    write_text(path, json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")
