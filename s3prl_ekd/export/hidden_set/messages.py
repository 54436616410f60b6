"""What passes between ``validate`` and the process that runs a package: JSON and plain tensors.

A message is two lengths of eight bytes, a JSON object and the numbers of its tensors. Reading one
executes nothing, and allocates no more than the limits below: the other side is not trusted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch
from torch import Tensor

MAX_JSON = 1 << 20  # bytes of a message's JSON
MAX_NUMBERS = 1 << 28  # in a message's tensors: 1 GiB of float32
MAX_TEXT = 500  # characters of a text that is shown
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
_DEPTH = 8  # of lists in lists


class BadMessage(Exception):
    """A message is not of this format, or too large."""


class Other:
    """Stands for an object that is neither a list, a tuple, a dict nor a plain tensor.

    Attributes:
        name: of its type.
    """

    def __init__(self, name: str):
        self.name = name


def type_name(value: Any) -> str:
    """The name of the type that ``value`` has, or stands for."""
    return value.name if isinstance(value, Other) else type(value).__name__


def send(file: IO[bytes], facts: Mapping[str, Any], tensors: Sequence[Tensor] = ()) -> None:
    """Write a message.

    Args:
        facts: what JSON can hold.
        tensors: of any device; sent as CPU tensors.

    Raises:
        BadMessage: it is larger than a message may be.
    """
    numbers = sum(tensor.numel() for tensor in tensors)
    plain = [_plain(tensor) for tensor in tensors] if numbers <= MAX_NUMBERS else []
    head = json.dumps({"facts": facts, "tensors": [_layout(tensor) for tensor in plain]}).encode()
    if len(head) > MAX_JSON or numbers > MAX_NUMBERS:
        raise BadMessage(
            f"{numbers:,} numbers in tensors and {len(head):,} bytes of their description are "
            f"more than is read ({MAX_NUMBERS:,} and {MAX_JSON:,})"
        )
    body = sum(tensor.numel() * tensor.element_size() for tensor in plain)
    file.write(len(head).to_bytes(8, "little") + body.to_bytes(8, "little") + head)
    for tensor in plain:
        if tensor.numel():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    file.flush()


def receive(file: IO[bytes]) -> tuple[dict[str, Any], list[Tensor]]:
    """Read a message.

    Returns:
        Its facts, and CPU tensors.

    Raises:
        EOFError: the file ends.
        BadMessage: it is no message.
    """
    lengths = _read(file, 16)
    head, body = (int.from_bytes(part, "little") for part in (lengths[:8], lengths[8:]))
    if head > MAX_JSON or body > 8 * MAX_NUMBERS:
        raise BadMessage("a message is too large")
    try:
        message = json.loads(_read(file, head))
        facts, layouts = message["facts"], message["tensors"]
        sizes = [(_DTYPES[dtype], _shape(shape)) for dtype, shape in layouts]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadMessage("a message is not of the form that is expected") from None
    counts = [math.prod(shape) for _, shape in sizes]
    bytes_of = [count * dtype.itemsize for count, (dtype, _) in zip(counts, sizes, strict=True)]
    if not isinstance(facts, dict) or sum(bytes_of) != body or sum(counts) > MAX_NUMBERS:
        raise BadMessage("a message's tensors are not as long as it says")
    tensors = []
    for (dtype, shape), length in zip(sizes, bytes_of, strict=True):
        data = _read(file, length)
        if dtype == torch.bool and data.translate(None, b"\0\1"):
            raise BadMessage("a message's truth values are neither 0 nor 1")
        flat = torch.frombuffer(data, dtype=dtype) if length else torch.empty(0, dtype=dtype)
        tensors.append(flat.reshape(shape))
    return facts, tensors


def describe(value: Any, tensors: list[Tensor], depth: int = _DEPTH) -> dict[str, Any]:
    """A package's result as JSON; its tensors are added to ``tensors``, each once."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.dtype not in _DTYPES.values():
            return {"other": f"{type(value).__name__} of {value.dtype}"}
        index = next((i for i, tensor in enumerate(tensors) if tensor is value), len(tensors))
        if index == len(tensors):
            tensors.append(value)
        return {"tensor": index, "device": str(value.device)}
    if depth and isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [describe(item, tensors, depth - 1) for item in value]}
    if depth and isinstance(value, dict):
        items = [[str(key), describe(item, tensors, depth - 1)] for key, item in value.items()]
        return {"dict": items}
    return {"other": type(value).__name__}


def rebuild(described: Any, tensors: Sequence[Tensor], devices: dict[int, str]) -> Any:
    """What :func:`describe` described, of plain lists, tuples, dicts, tensors and :class:`Other`.

    Args:
        described: as the other side sent it.
        tensors: those that came with it.
        devices: gets, under the ``id`` of each tensor used, the device that it was on.

    Raises:
        BadMessage: it is no description.
    """
    try:
        if "tensor" in described:
            index, device = described["tensor"], described["device"]
            if type(index) is not int or not 0 <= index < len(tensors):
                raise BadMessage("a message names a tensor that it does not have")
            devices[id(tensors[index])] = text(device)
            return tensors[index]
        if "list" in described:
            return [rebuild(item, tensors, devices) for item in described["list"]]
        if "tuple" in described:
            return tuple(rebuild(item, tensors, devices) for item in described["tuple"])
        if "dict" in described:
            return {text(k): rebuild(item, tensors, devices) for k, item in described["dict"]}
        return Other(text(described["other"]))
    except (TypeError, ValueError, KeyError, RecursionError):
        raise BadMessage("a message describes no result") from None


def text(value: Any) -> str:
    """A text of a message as one short line of printable characters. Raises BadMessage."""
    if not isinstance(value, str):
        raise BadMessage("a message has something else in the place of a text")
    line = " ".join(value[: 4 * MAX_TEXT].split())
    return "".join(char if char.isprintable() else "?" for char in line[:MAX_TEXT])


def texts(value: Any) -> list[str]:
    """A list of texts of a message. Raises BadMessage."""
    if not isinstance(value, list):
        raise BadMessage("a message has something else in the place of a list of texts")
    return [text(item) for item in value]


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, without gradient, subclass or gaps."""
    return tensor.detach().as_subclass(Tensor).cpu().resolve_neg().contiguous()


def _layout(tensor: Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _shape(shape: Any) -> list[int]:
    if not isinstance(shape, list) or len(shape) > 16:
        raise ValueError
    if any(type(size) is not int or not 0 <= size <= MAX_NUMBERS for size in shape):
        raise ValueError
    return shape


def _read(file: IO[bytes], count: int) -> bytearray:
    data = bytearray()
    while len(data) < count:
        block = file.read(min(count - len(data), 1 << 24))
        if not block:
            raise EOFError
        data += block
    return data
