"""``torchaudio.load``, ``save`` and ``info`` through soundfile.

In torchaudio 2.9, ``load`` and ``save`` use torchcodec, which needs FFmpeg, and ``info`` is gone.
soundfile comes with libsndfile and reads WAV, FLAC, Ogg Vorbis, Opus and MP3.
"""

from __future__ import annotations

import importlib
import io
import os
import warnings
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import DataError
from .shim import Shim
from .torchaudio_import import lacks, set_attributes

if TYPE_CHECKING:
    import soundfile
    import torch

Source = str | os.PathLike | BinaryIO

# (encoding, bits per sample) as torchaudio names them -> libsndfile's subtype
SUBTYPES = {
    ("PCM_S", 8): "PCM_S8",
    ("PCM_S", 16): "PCM_16",
    ("PCM_S", 24): "PCM_24",
    ("PCM_S", 32): "PCM_32",
    ("PCM_U", 8): "PCM_U8",
    ("PCM_F", 32): "FLOAT",
    ("PCM_F", 64): "DOUBLE",
    ("ULAW", 8): "ULAW",
    ("ALAW", 8): "ALAW",
}
ENCODINGS = {subtype: encoding for encoding, subtype in SUBTYPES.items()}
LOSSY = {"VORBIS": "VORBIS", "OPUS": "OPUS", "MPEG_LAYER_III": "MP3"}
DEFAULT_BITS = {"PCM_S": 32, "PCM_U": 8, "PCM_F": 32, "ULAW": 8, "ALAW": 8}

# file extension -> (libsndfile's container, its default subtype);
# None: the subtype follows from the type of the samples
CONTAINERS = {
    "wav": ("WAV", None),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "vorbis": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
BY_SAMPLE_TYPE = {"float32": "FLOAT", "float64": "DOUBLE", "int16": "PCM_16", "int32": "PCM_32"}
INTEGER_TYPES = {"PCM_16": "int16", "PCM_24": "int32", "PCM_32": "int32"}


@dataclass
class AudioMetaData:
    """The result of :func:`info`."""

    sample_rate: int  # Hz
    num_frames: int  # samples of one channel
    num_channels: int
    bits_per_sample: int  # 0 for a lossy or unrecognised encoding
    encoding: str


def _open(uri: Source) -> soundfile.SoundFile:
    import soundfile

    if isinstance(uri, (str, os.PathLike)) and not os.path.isfile(uri):
        raise DataError(f"no such audio file: {os.fspath(uri)}")
    try:
        return soundfile.SoundFile(uri)
    except soundfile.LibsndfileError as error:
        raise DataError(f"cannot read audio file {uri}: {error}") from error


def load(
    uri: Source,
    frame_offset: int = 0,
    num_frames: int = -1,
    normalize: bool = True,
    channels_first: bool = True,
    format: str | None = None,
    buffer_size: int = 4096,
    backend: str | None = None,
) -> tuple[torch.Tensor, int]:
    """Read audio as ``torchaudio.load`` does: the samples, and the rate in Hz.

    Args:
        normalize: if False, 16, 24 and 32 bit integer WAV is returned as integers. All other audio
            is float32 in [-1, 1] in both cases.
        format, buffer_size, backend: ignored; libsndfile detects the format.

    Raises:
        DataError: the file does not exist, or libsndfile cannot read it.
        ValueError: ``frame_offset`` is negative, or ``num_frames`` below -1.
    """
    import torch

    if frame_offset < 0 or num_frames < -1:
        raise ValueError(
            f"frame_offset must be 0 or more and num_frames -1 or more, "
            f"got {frame_offset} and {num_frames}"
        )
    with _open(uri) as file:
        as_integer = not normalize and file.format == "WAV"
        dtype = INTEGER_TYPES.get(file.subtype, "float32") if as_integer else "float32"
        # libsndfile raises for an offset beyond the end; torchaudio returns no samples
        file.seek(min(frame_offset, file.frames))
        samples = file.read(num_frames, dtype=dtype, always_2d=True)  # [time, channel]
        sample_rate = file.samplerate
    wav = torch.from_numpy(samples)
    return (wav.t().contiguous() if channels_first else wav), sample_rate


def save(
    uri: Source,
    src: torch.Tensor,
    sample_rate: int,
    channels_first: bool = True,
    format: str | None = None,
    encoding: str | None = None,
    bits_per_sample: int | None = None,
    buffer_size: int = 4096,
    backend: str | None = None,
    compression: float | int | None = None,
) -> None:
    """Write audio as ``torchaudio.save`` does.

    Args:
        src: [channel, time] ([time, channel] if not ``channels_first``) or [time]; float32 or
            float64 in [-1, 1], int16 or int32. WAV keeps the type; FLAC has 16 bits.
        format: a key of :data:`CONTAINERS`; by default the extension of ``uri``.
        encoding, bits_per_sample: see :data:`SUBTYPES`.
        buffer_size, backend, compression: ignored.

    Raises:
        DataError: the format, encoding, shape or type is not supported.
    """
    import soundfile

    name = format or ("" if hasattr(uri, "write") else Path(uri).suffix.lstrip("."))
    if name.lower() not in CONTAINERS:
        raise DataError(f"{uri}: format must be one of {', '.join(CONTAINERS)}; got {name!r}")
    samples = src.detach().cpu()
    if samples.ndim == 1:
        samples = samples.unsqueeze(0 if channels_first else 1)
    sample_type = str(samples.dtype).removeprefix("torch.")
    if samples.ndim != 2 or sample_type not in BY_SAMPLE_TYPE:
        raise DataError(
            f"{uri}: samples must be [channel, time] of {', '.join(BY_SAMPLE_TYPE)}, "
            f"got {list(src.shape)} of {sample_type}"
        )
    container, subtype = CONTAINERS[name.lower()]
    if encoding or bits_per_sample:
        eight_bit_wav = container == "WAV" and bits_per_sample == 8  # unsigned
        encoding = encoding or ("PCM_U" if eight_bit_wav else "PCM_S")
        subtype = SUBTYPES.get((encoding, bits_per_sample or DEFAULT_BITS.get(encoding, 0)))
    subtype = subtype or BY_SAMPLE_TYPE[sample_type]
    if not soundfile.check_format(container, subtype):
        raise DataError(f"{uri}: {name} does not support {encoding} with {bits_per_sample} bits")
    samples = samples.t() if channels_first else samples  # [time, channel]
    soundfile.write(uri, samples.numpy(), sample_rate, subtype=subtype, format=container)


def info(
    uri: Source, format: str | None = None, buffer_size: int = 4096, backend: str | None = None
) -> AudioMetaData:
    """Read the header, as ``torchaudio.info`` did. Raises :class:`DataError`."""
    with _open(uri) as file:
        encoding, bits = ENCODINGS.get(file.subtype, (LOSSY.get(file.subtype, "UNKNOWN"), 0))
        if file.format == "FLAC":
            encoding = "FLAC"
        return AudioMetaData(file.samplerate, file.frames, file.channels, bits, encoding)


def audio_decoder() -> str:
    """The library behind ``torchaudio.load`` and its version; raises ImportError without one."""
    import soundfile
    import torchaudio

    sndfile = f"libsndfile {soundfile.__libsndfile_version__}"
    if torchaudio.load is load:
        return f"soundfile {soundfile.__version__} ({sndfile})"
    if hasattr(torchaudio, "list_audio_backends"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in 2.8
            backends = ", ".join(torchaudio.list_audio_backends())
        return f"torchaudio {torchaudio.__version__} ({backends}; {sndfile})"
    return f"torchcodec {importlib.import_module('torchcodec').__version__}"


def _cannot_load() -> bool:
    """Whether torchaudio cannot read 10 ms of silence."""
    if lacks("load"):
        return True
    import torchaudio

    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(2 * 160))
    buffer.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 2.8 warns at each call that 2.9 will change
        try:
            torchaudio.load(buffer)
        # ImportError: no torchcodec. RuntimeError or OSError: torchcodec finds no FFmpeg.
        except (ImportError, RuntimeError, OSError):
            return True
    return False


LOAD = Shim(
    name="torchaudio.load",
    needed_by=(
        "downstream/asr/dataset.py:112",
        "downstream/ctc/data.py:16",
        "downstream/voxceleb1/dataset.py:106",
        "downstream/emotion/dataset.py:36",
        "util/pseudo_data.py:37",
    ),
    since="torchaudio 2.9",
    summary="load and save through soundfile, as torchcodec cannot be imported",
    missing=_cannot_load,
    apply=lambda: set_attributes(load=load, save=save),
)


INFO = Shim(
    name="torchaudio.info",
    needed_by=("util/audio_info.py:51", "problem/common/superb_ks.py:76"),
    since="torchaudio 2.9",
    summary="info and AudioMetaData through soundfile",
    missing=lambda: lacks("info"),
    apply=lambda: set_attributes(info=info, AudioMetaData=AudioMetaData),
)
