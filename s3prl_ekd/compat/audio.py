"""Shims for ``torchaudio.load``, ``save`` and ``info``, and the name of the audio decoder."""

from __future__ import annotations

import importlib
import io
import warnings
import wave

from .shim import Shim
from .soundfile_io import AudioMetaData, info, load, save
from .torchaudio_import import lacks, set_attributes


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
