"""Write a safetensors file tensor by tensor, without holding them.

A safetensors file is eight bytes of header length, a JSON header and the tensors' bytes. The header
comes first and says what follows, so safetensors' own writer wants all tensors at once. Here room
for the header is kept free, the tensors follow as they come, and the header is written last, filled
up with the spaces that the format allows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import DataError

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_LIMIT = 100_000_000  # bytes; safetensors reads no longer header
_NUMBERS = 200  # bytes; more than dtype, shape and offsets of an entry can take


class FeaturesFile:
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
        room = len(json.dumps(self.header)) + _NUMBERS
        count = 0
        for key in keys:
            room += len(json.dumps(key)) + _NUMBERS
            count += 1
        self.room = room + -room % 8  # the tensors begin at a multiple of eight
        if self.room > _LIMIT:
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
