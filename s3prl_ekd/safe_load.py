"""Read a torch file as data: plain tensors and containers, never code."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError


def safe_load(path: str | Path, what: str = "checkpoint", allow: Sequence[type] = ()) -> dict:
    """``torch.load`` with ``weights_only=True`` and our own errors.

    Args:
        path: the file. Tensors stay on disk until used (memory-mapped) where the format allows.
        what: the noun for messages.
        allow: classes that the file may name beside tensors and plain containers.

    Raises:
        CheckpointError: the file is missing, damaged, no mapping, or asks for any other class.
    """
    path = Path(path)
    if not path.is_file():
        kind = "it is a folder" if path.is_dir() else "there is no such file"
        raise CheckpointError(f"cannot read the {what} {path}: {kind}")
    # The context takes away at its end all that it was given: what is allowed already stays out.
    named = torch.serialization.get_safe_globals()
    new = [known for known in allow if known not in named]
    try:
        with torch.serialization.safe_globals(new):
            data: Any = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            raise CheckpointError(
                f"the {what} {path} asks for {asked[1]}, which is code and not data; it is not "
                "loaded. Use a file of plain tensors"
            ) from None
        raise CheckpointError(f"the {what} {path} is damaged or no torch file") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the {what} {path}: {error.strerror}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise CheckpointError(f"the {what} {path} is damaged or no torch file") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"the {what} {path} holds a {type(data).__name__}, not a mapping")
    return data
