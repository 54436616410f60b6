"""Hidden states of a waveform in a safetensors file, under a name that depends on the samples.

The tensor ``states`` ``[layer, frame, width]`` is in float16, or in float32 if a value exceeds
float16's 65504 or is not finite; the metadata has a CRC.
"""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from .atomic import atomic_file
from .safetensors_file import SUFFIX, raw_bytes, read_safetensors, write_safetensors

_FLOAT16_MAX = 65504.0


def wave_key(wave: Tensor) -> str:
    """Hash of a waveform ``[sample]`` and its length."""
    digest = hashlib.blake2b(f"{wave.numel()} ".encode(), digest_size=16)
    digest.update(raw_bytes(wave.float()))
    return digest.hexdigest()


def states_path(folder: Path, key: str) -> Path:
    """The file in ``folder`` of the waveform with this key."""
    return folder / key[:2] / f"{key[2:]}{SUFFIX}"


def to_storage_dtype(states: Tensor) -> Tensor:
    """Convert ``states`` to the dtype in which they are stored."""
    # NaN and infinity compare as False, so they stay float32
    return states.half() if bool((states.abs() <= _FLOAT16_MAX).all()) else states.float()


def write_states_file(path: Path, states: Tensor, *, sync: bool) -> tuple[int, str]:
    """Write a file, whole or not at all; return its bytes and the CRC of the states.

    ``sync``: wait until it is on the disk. Without it, a power failure may leave a file that the
    CRC shows to be damaged.

    Raises:
        OSError: it cannot be written.
    """
    crc = _crc(states)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, sync=sync) as file:
        write_safetensors(file, {"states": states}, {"crc": crc})
        return file.tell(), crc


def read_states_file(path: Path, noun: str) -> tuple[Tensor, str]:
    """Read the states and their CRC.

    Raises:
        CheckpointError: the file is missing or damaged; ``noun`` says what the file is.
    """
    metadata, tensors = read_safetensors(path, noun)
    states = tensors.get("states")
    if states is None or metadata.get("crc") != _crc(states):
        raise CheckpointError(f"{path} is damaged")
    return states, metadata["crc"]


def _crc(states: Tensor) -> str:
    """CRC-32 of dtype, shape and values."""
    start = zlib.crc32(f"{states.dtype} {tuple(states.shape)}".encode())
    return f"{zlib.crc32(raw_bytes(states), start):08x}"
