"""Out of memory, in a sentence: the device's, or the machine's, which kills a worker."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from ..data.audio_files import SAMPLE_RATE
from ..data.batches import Batch
from ..data.loader import advice, shared_memory
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
    """Turn what happens to the processes that read audio into a sentence.

    Raises:
        SetupError: a worker died, or they gave no batch for the loader's timeout.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        late = re.search(r"DataLoader timed out after (\S+) seconds", said)
        if late:
            raise SetupError(
                f"the processes that read audio gave no batch for {float(late[1]):g} s: the disk "
                f"does not answer, or shared memory is full ({shared_memory()}); see that "
                f"libri_root can be read; or {advice()}; for a disk that is only slow, raise "
                f"pretrain_expert.datarc.loader_timeout; {hint}"
            ) from None
        if "DataLoader worker" not in said:
            raise
        if "Bus error" in said:
            raise SetupError(
                f"a process that reads audio has no shared memory left ({shared_memory()}): "
                f"{advice()}; {hint}"
            ) from None
        raise SetupError(
            f"a process that reads audio was killed ({error}): often the machine's memory is full; "
            f"lower pretrain_expert.datarc.num_workers; {hint}"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)
