"""Read safetensors files that anybody may have written, and write our own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .text import check_regular, download_problem

SUFFIX = ".safetensors"
MAX_HEADER = 8 << 20  # bytes of names, shapes and metadata; 1000 tensors take 100,000
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is one for :func:`read_safetensors`, by its suffix or by what it begins with:
    a downloaded one may have any name."""
    path = Path(path)
    if path.suffix == SUFFIX:
        return True
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(9)  # eight bytes of length and the first of a JSON object
    except OSError:
        return False
    return head[8:] == b"{"


@contextlib.contextmanager
def open_safetensors(path: str | Path, what: str) -> Iterator[safe_open]:
    """A file whose metadata and tensors can be asked for.

    Args:
        path: the file.
        what: the noun for messages.

    Raises:
        CheckpointError: it is missing or damaged, also where that shows while it is open.
    """
    check_regular(path, what, CheckpointError)
    if problem := download_problem(path):
        raise CheckpointError(f"the {what} {path} {problem}")
    try:
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise CheckpointError(
                f"the {what} {path} is damaged or no safetensors file: its header has {length:,} "
                "bytes"
            )
        with safe_open(str(path), framework="pt") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"cannot read the {what} {path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or ["unreadable"])[0]
        raise CheckpointError(
            f"the {what} {path} is damaged or no safetensors file: {first[:200]}"
        ) from None


def read_safetensors(path: str | Path, what: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a file, on the CPU.

    Raises:
        CheckpointError: see :func:`open_safetensors`; or a tensor has numbers of another type than
            :data:`FLOATS`.
    """
    with open_safetensors(path, what) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"the {what} {path} is damaged: {name[:60]!r} has the type {tensor.dtype}, and "
                "float32, float16, bfloat16 or float64 is allowed"
            )
    return metadata, tensors


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file; views and tensors that share memory are written each for itself.

    safetensors' own writer puts the metadata in another order each time. Here the same contents
    are the same bytes, by which ``superb`` knows a checkpoint again.
    """
    from ..hidden_states.features_file import (
        FeaturesFile,
    )  # that package reads student files with this one

    written = FeaturesFile(file, tensors, metadata)
    for name, tensor in tensors.items():
        written.add(name, tensor)
    written.finish()
