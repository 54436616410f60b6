"""Read the scalars of a run's TensorBoard files, without TensorBoard."""

from __future__ import annotations

import struct
from pathlib import Path

from tensorboardX.proto import event_pb2

_HEADER, _FOOTER = 12, 4  # bytes around a record: its length with a checksum, and a checksum


def read_scalars(folder: str | Path) -> dict[str, dict[int, float]]:
    """All scalars in ``folder/events.*``: tag -> step -> value.

    A step written twice (a run that was cut and resumed) keeps the later value. A record that was
    cut off at the end of a file is left out.
    """
    found: dict[str, dict[int, float]] = {}
    for path in sorted(Path(folder).glob("events.*"), key=lambda path: path.stat().st_mtime):
        data, at = path.read_bytes(), 0
        while at + _HEADER <= len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            record = data[at + _HEADER : at + _HEADER + size]
            at += _HEADER + size + _FOOTER
            if len(record) < size:
                break
            event = event_pb2.Event.FromString(record)
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return {tag: dict(sorted(points.items())) for tag, points in found.items()}
