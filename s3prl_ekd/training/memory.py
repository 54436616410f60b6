"""Out of memory, in a sentence: the device's, or the machine's, which kills a worker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..data.audio_files import SAMPLE_RATE
from ..data.batches import Batch
from ..errors import SetupError

# What torch's allocators say: CUDA, MPS, Linux and other CPUs.
SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


@contextlib.contextmanager
def memory_explained(step: int, batch: Batch, device: str, hint: str) -> Iterator[None]:
    """Turn "out of memory" into a sentence with the batch's size and what to lower.

    Args:
        step: number of the step, from 1.
        batch: what is being computed on.
        device: where.
        hint: how to go on.

    Raises:
        SetupError: memory was out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        count, samples = (*batch.waves.shape, 0)[:2]
        seconds = samples / SAMPLE_RATE
        raise SetupError(
            f"out of memory on {device} at step {step}: the batch has {count} utterances, padded "
            f"to {seconds:.1f} s each ({count * seconds:.0f} s in all); lower train_batch_size "
            f"(and raise gradient_accumulate_steps as much), or sequence_length; {hint}"
        ) from None


@contextlib.contextmanager
def workers_explained(hint: str) -> Iterator[None]:
    """Turn the death of a process that reads audio into a sentence.

    Raises:
        SetupError: a worker died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise SetupError(
            f"a process that reads audio was killed ({error}): often the machine's memory is full; "
            f"lower pretrain_expert.datarc.num_workers; {hint}"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)
