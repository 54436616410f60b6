"""Copy batches to the device ahead of their step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from .batch import Batch


def prefetch(batches: Iterable[Batch], device: str) -> Iterator[Batch]:
    """Yield batches with their waveforms and cached targets on ``device``, a CUDA device.

    The copies of a batch are issued before the previous batch is yielded, on a stream of
    their own. From pinned memory, they run during the previous step. Lengths and spans stay on the
    CPU, which counts frames.
    """
    stream, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = copy_batch(batch, device), stream.record_event()
        if ahead is not None:
            yield _wait_for_copies(*ahead)
        ahead = copied
    if ahead is not None:
        yield _wait_for_copies(*ahead)


def copy_batch(batch: Batch, device: str) -> Batch:
    """Copy waveforms and cached targets to ``device``, asynchronously if pinned."""
    copies = {
        name: tensor.to(device, non_blocking=True)
        for name in ("waves", "teacher_waves")
        if (tensor := getattr(batch, name)) is not None
    }
    targets = None if batch.targets is None else batch.targets.to(device)
    return batch._replace(targets=targets, **copies)


def _wait_for_copies(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Let the current stream wait for the copies; keep their memory until its work is done."""
    stream = torch.cuda.current_stream(batch.waves.device)
    stream.wait_event(copied)
    targets = () if batch.targets is None else batch.targets.tensors()
    for tensor in (batch.waves, batch.teacher_waves, *targets):
        if tensor is not None:
            tensor.record_stream(stream)
    return batch
