"""Teachers whose hidden states another program computed: a folder of them, as a teacher.

:func:`write_states` adds the hidden states of a waveform. The folder has a file for each waveform
(:mod:`..files.states_file`), ``stored_states.json`` with the number and the width of the layers and
the positions of the frames, and ``stored_states.txt``, a line ``KEY CRC`` for each file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..distill.teachers import StatedOutputs
from ..errors import CheckpointError, DataError, TeacherError
from ..files.atomic import write_text
from ..files.formats import check_format_version
from ..files.states_file import (
    read_states_file,
    states_path,
    to_storage_dtype,
    wave_key,
    write_states_file,
)
from ..files.text import read_json, read_text
from .names import STORED

FORMAT, VERSION = "s3prl_ekd.stored_states", 1
LIST = "stored_states.txt"
_LINE = re.compile(r"^([0-9a-f]{32}) ([0-9a-f]{8})$", re.MULTILINE)
_MAX_LIST = 1 << 30  # bytes; 43 for each waveform
_FIELDS = ("layers", "width", "stride", "field")


def write_states(
    folder: str | Path, wave: Tensor, states: Tensor, *, stride: int = 320, field: int = 400
) -> None:
    """Store the hidden states of a waveform in a folder that can then be a teacher's ``model``.

    Processes may write different waveforms into one folder at the same time. Values are stored in
    float16 if all are within its range.

    Args:
        folder: created if it does not exist.
        wave: ``[sample]`` at 16 kHz, exactly as the teacher will get it: see
            :class:`~s3prl_ekd.pretrain.target_cache.build.CachedWaves`.
        states: ``[layer, frame, width]``, with ``(samples - field) // stride + 1`` frames.
        stride: samples from one frame to the next; that of the student.
        field: samples of the shortest waveform with one frame. Both defaults are HuBERT's.

    Raises:
        DataError: other shapes than these, or than those of the states already in the folder.
        CheckpointError: the folder's ``stored_states.json`` is damaged.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    frames = (len(wave) - field) // stride + 1  # as Teacher.frames
    if states.dim() != 3 or states.shape[1] != frames or 0 in states.shape:
        raise DataError(
            f"write_states: states must be [layer, frame, width] with {frames} frames for "
            f"{len(wave)} samples (stride {stride}, field {field}), got {list(states.shape)}"
        )
    index = dict(zip(_FIELDS, (len(states), states.shape[2], stride, field), strict=True))
    if (folder / STORED).exists():
        existing = _read_index(folder)
        if existing != index:
            raise DataError(
                f"write_states: {folder} has states of {existing}, got {index}; use another folder"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "version": VERSION}
        write_text(folder / STORED, json.dumps(about | index, indent=1) + "\n")
    key = wave_key(wave)
    stored = to_storage_dtype(states.detach().cpu()).contiguous()
    _, crc = write_states_file(states_path(folder, key), stored, sync=True)
    with (folder / LIST).open("a") as file:
        file.write(f"\n{key} {crc}\n")  # a killed process may have left half a line
        file.flush()
        os.fsync(file.fileno())


class StoredStates(nn.Module):
    """A folder of hidden states as an upstream: it looks each waveform up.

    Args:
        folder: as :func:`write_states` writes it.
        location: starts messages.

    Attributes:
        stated: depth, widths and positions of the frames, which cannot be measured on noise.
        digest: of the contents of the folder; a buffer, so that the digest of the upstream's
            weights, by which a target cache identifies a teacher, has it.

    Raises:
        CheckpointError: its index is damaged.
    """

    digest: Tensor

    def __init__(self, folder: str | Path, location: str = "stored states"):
        super().__init__()
        self.folder, self.location = Path(folder), location
        index = _read_index(self.folder)
        path = self.folder / LIST
        text = read_text(path, "list of stored states", CheckpointError, _MAX_LIST)
        self._crcs = dict(_LINE.findall(text))  # of a waveform written twice, the newer one
        widths = (index["width"],) * index["layers"]
        self.stated = StatedOutputs(widths, index["stride"], index["field"])
        contents = json.dumps([index, sorted(self._crcs.items())]).encode()
        digest = bytearray(hashlib.blake2b(contents, digest_size=16).digest())
        self.register_buffer("digest", torch.frombuffer(digest, dtype=torch.uint8))

    def __contains__(self, wave: Tensor) -> bool:
        """Whether the folder has the states of a waveform ``[sample]``."""
        key = wave_key(wave)
        return key in self._crcs and states_path(self.folder, key).is_file()

    def get_downsample_rates(self, key: str) -> int:
        """Samples from one frame to the next."""
        return self.stated.stride

    def forward(self, waves: list[Tensor]) -> dict[str, list[Tensor]]:
        """Read the ``hidden_states`` ``[batch, frame, width]`` of unpadded waveforms ``[sample]``.

        Raises:
            TeacherError: the folder has no states of a waveform.
            CheckpointError: a file is damaged.
        """
        states = [self._read(wave).float().transpose(0, 1) for wave in waves]
        padded = pad_sequence(states, batch_first=True).to(waves[0].device)
        return {"hidden_states": list(padded.unbind(2))}

    def _read(self, wave: Tensor) -> Tensor:
        """The states ``[layer, frame, width]`` of a waveform ``[sample]``."""
        key = wave_key(wave)
        if key not in self._crcs:
            raise TeacherError(
                f"{self.location}: {self.folder} has no hidden states of this waveform of "
                f"{len(wave)} samples; for training, store the states of every waveform of "
                "s3prl_ekd.pretrain.target_cache.build.CachedWaves with this runner config and "
                "seed, and train from the cache of `s3prl-ekd cache -o CACHE`: without a cache, "
                "excerpts and distortions change with each epoch; for other commands, store "
                "those of the first 250,000 samples of each file"
            )
        path = states_path(self.folder, key)
        advice = "remove the file, and store the states of its waveform again"
        try:
            states, crc = read_states_file(path, "file of stored states")
        except CheckpointError as error:
            raise CheckpointError(f"{self.location}: {error}; {advice}") from None
        widths, stride, field = self.stated
        shape = (len(widths), (len(wave) - field) // stride + 1, widths[0])
        if crc != self._crcs[key] or states.shape != shape:
            raise CheckpointError(
                f"{self.location}: {path} is not the file that {LIST} lists; {advice}"
            )
        return states


def _read_index(folder: Path) -> dict[str, Any]:
    """The number and width of the layers, stride and field. Raises CheckpointError."""
    path = folder / STORED
    data = read_json(path, "index of stored states", CheckpointError)
    if data.get("format") == FORMAT:
        check_format_version(data.get("version"), VERSION, f"the index of stored states {path}")
        index = {name: data.get(name) for name in _FIELDS}
        values = [value for value in index.values() if type(value) is int]
        if len(values) == len(_FIELDS) and min(values[:3]) > 0:
            return index
    raise CheckpointError(f"{path} is damaged or not the index of stored states; write it again")
