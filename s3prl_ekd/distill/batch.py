"""A batch of waveforms, optionally with precomputed teacher targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CachedTargets:
    """Precomputed teacher targets of a batch; if given, no teacher is run.

    ``values``: ``{teacher: [batch, target, frame, dim]}``, or with ``aggregated``
    ``{target set: [batch, layer, frame, width]}``. ``frames``: ``[batch]``, how many of them are
    valid, on the CPU.
    """

    values: Mapping[str, Tensor]
    frames: Tensor
    aggregated: bool = False


@dataclass(frozen=True)
class DistillBatch:
    """A batch on the distiller's device; lengths are on the CPU, so that no step waits for them.

    ``waves``: input of the student, ``[batch, sample]`` at 16 kHz, zero-padded at the end.
    ``lengths``: ``[batch]``, valid samples. ``teacher_waves``: input of the teachers, of the same
    shape; None: the same as ``waves``. ``cached_targets``: used instead of running the teachers.
    ``spans``: bool ``[batch, frame]``, the student's frames in masked spans; None: nothing is
    masked.
    """

    waves: Tensor
    lengths: Tensor
    teacher_waves: Tensor | None = None
    cached_targets: CachedTargets | None = None
    spans: Tensor | None = None
