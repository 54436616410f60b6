"""Read safetensors files that anybody may have written, and write our own tensor by tensor.

A safetensors file is eight bytes of header length, a JSON header and the tensors' bytes. The header
comes first and says what follows, so safetensors' own writer wants all tensors at once. Here room
for the header is kept free, the tensors follow as they come, and the header is written last, filled
up with the spaces that the format allows.
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
        raise CheckpointError(
            f"the {what} {path} is damaged or no safetensors file: {first_line(error)[:200]}"
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


DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_HEADER_LIMIT = 100_000_000  # bytes; safetensors reads no longer header
_ENTRY_BYTES = 200  # bytes; more than dtype, shape and offsets of an entry can take


class SafetensorsWriter:
    """A safetensors file that is being written.

    Args:
        file: open for writing, able to seek.
        keys: every key that may come, each at most once; some may stay away.
        metadata: texts that the file keeps.

    Raises:
        DataError: there are more keys than a safetensors file can hold.
    """

    def __init__(self, file: BinaryIO, keys: Iterable[str], metadata: Mapping[str, str]):
        self.file = file
        self.header: dict[str, object] = {"__metadata__": dict(metadata)}
        room = len(json.dumps(self.header)) + _ENTRY_BYTES
        count = 0
        for key in keys:
            room += len(json.dumps(key)) + _ENTRY_BYTES
            count += 1
        self.room = room + -room % 8  # the tensors begin at a multiple of eight
        if self.room > _HEADER_LIMIT:
            raise DataError(
                f"{count:,} tensors are more than one safetensors file can name; "
                "give fewer files at once, or --layers last"
            )
        self.offset = 0
        file.write(b"\0" * (8 + self.room))

    def add(self, key: str, tensor: Tensor) -> None:
        """Write one tensor behind the others. Raises DataError: it has no float numbers."""
        if tensor.dtype not in DTYPES:
            raise DataError(
                f"{key!r:.80} has numbers of the type {tensor.dtype}; floats are written"
            )
        data = tensor.detach().cpu().contiguous()
        raw = data.flatten().view(torch.uint8).numpy()  # numpy has no bfloat16
        self.header[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.offset, self.offset + raw.nbytes],
        }
        self.file.write(raw.data)
        self.offset += raw.nbytes

    def finish(self) -> None:
        """Write the header; the file can be read from here on."""
        text = json.dumps(self.header).encode("utf-8")
        if len(text) > self.room:
            raise ValueError("a key came that was not announced")
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little"))
        self.file.write(text.ljust(self.room))
        self.file.seek(0, 2)


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file; views and tensors that share memory are written each for itself.

    safetensors' own writer puts the metadata in another order each time. Here the same contents
    are the same bytes, by which ``superb`` knows a checkpoint again.
    """
    written = SafetensorsWriter(file, tensors, metadata)
    for name, tensor in tensors.items():
        written.add(name, tensor)
    written.finish()
