"""Read untrusted safetensors files, and write safetensors files one tensor at a time.

A safetensors file has eight bytes of header length, a JSON header with all names and offsets, and
the tensors' bytes. safetensors' own writer needs all tensors in memory at once. The writer here
reserves space for the header, appends the tensors one by one, and writes the header last, padded
with spaces as the format allows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, DataError, first_line
from .text import check_regular, download_problem

SUFFIX = ".safetensors"
MAX_HEADER = 8 << 20  # bytes of names, shapes and metadata; 1000 tensors take 100,000
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_HEADER_LIMIT = 100_000_000  # bytes; safetensors rejects longer headers
_ENTRY_BYTES = 200  # bytes; an upper bound for dtype, shape and offsets of one tensor


def is_safetensors(path: str | Path) -> bool:
    """Detect a safetensors file by its suffix or its first bytes: a download may have any name."""
    path = Path(path)
    if path.suffix == SUFFIX:
        return True
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(9)  # header length and the first byte of the JSON header
    except OSError:
        return False
    return head[8:] == b"{"


def check_header(path: str | Path, noun: str) -> None:
    """Check that a file is regular and was downloaded, and that its header is not too long.

    Args:
        path: the file.
        noun: what the file is, for error messages, such as "checkpoint".

    Raises:
        CheckpointError: it is not.
    """
    check_regular(path, noun, CheckpointError)
    if problem := download_problem(path):
        raise CheckpointError(f"the {noun} {path} {problem}")
    try:
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise CheckpointError(f"cannot read the {noun} {path}: {error.strerror}") from None
    if length > MAX_HEADER:
        raise CheckpointError(
            f"the {noun} {path} is damaged or not a safetensors file: its header has {length:,} "
            f"bytes, the limit is {MAX_HEADER:,}"
        )


@contextlib.contextmanager
def open_safetensors(path: str | Path, noun: str) -> Iterator[safe_open]:
    """Open an untrusted safetensors file for reading; arguments as for :func:`check_header`.

    Raises:
        CheckpointError: the file is missing or damaged; raised also for errors within the block.
    """
    check_header(path, noun)
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"cannot read the {noun} {path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the {noun} {path} is damaged or not a safetensors file: {first_line(error)[:200]}"
        ) from None


def read_safetensors(path: str | Path, noun: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and the tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: see :func:`open_safetensors`; or a tensor's dtype is not in :data:`DTYPES`.
    """
    with open_safetensors(path, noun) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"the {noun} {path} is damaged: the dtype of {name[:60]!r} must be float32, "
                f"float16, bfloat16 or float64, got {tensor.dtype}"
            )
    return metadata, tensors


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any dtype and device."""
    # as uint8, because numpy has no bfloat16
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


class SafetensorsWriter:
    """Write a safetensors file one tensor at a time.

    Args:
        file: open for writing, seekable.
        keys: all names that :meth:`add` may be called with; not all of them must be added.
        metadata: stored in the header.

    Raises:
        DataError: more keys than a safetensors header can hold.
    """

    def __init__(self, file: BinaryIO, keys: Iterable[str], metadata: Mapping[str, str]):
        self.file = file
        self.header: dict[str, object] = {"__metadata__": dict(metadata)}
        entries = [len(json.dumps(key)) + _ENTRY_BYTES for key in keys]
        size = len(json.dumps(self.header)) + _ENTRY_BYTES + sum(entries)
        self.header_bytes = size + -size % 8  # the tensors begin at a multiple of eight
        if self.header_bytes > _HEADER_LIMIT:
            raise DataError(
                f"{len(entries):,} tensors are too many for one safetensors file; give fewer files "
                "at once, or --layers last"
            )
        self.offset = 0
        file.write(b"\0" * (8 + self.header_bytes))

    def add(self, key: str, tensor: Tensor) -> None:
        """Append a tensor. Raises DataError if its dtype is not a float type."""
        if tensor.dtype not in DTYPES:
            raise DataError(f"the dtype of {key!r:.80} must be a float type, got {tensor.dtype}")
        raw = raw_bytes(tensor)
        self.header[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.offset, self.offset + raw.nbytes],
        }
        self.file.write(raw)
        self.offset += raw.nbytes

    def finish(self) -> None:
        """Write the header, which completes the file."""
        text = json.dumps(self.header).encode("utf-8")
        if len(text) > self.header_bytes:
            raise ValueError("a tensor was added whose name is not in keys")
        self.file.seek(0)
        self.file.write(self.header_bytes.to_bytes(8, "little"))
        self.file.write(text.ljust(self.header_bytes))
        self.file.seek(0, 2)


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors as a safetensors file; tensors that share memory are written separately.

    Equal contents give equal bytes, unlike with safetensors' own writer, which orders the metadata
    differently each time. ``superb`` identifies a checkpoint by its SHA-256.
    """
    writer = SafetensorsWriter(file, tensors, metadata)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
